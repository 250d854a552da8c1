"""vlmix: a workbench for vision-language models with several encoders and several experts.

The public names below are loaded when first used, so ``import vlmix`` needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vlmix._auto import install as _install

if TYPE_CHECKING:
    from vlmix.models.configuration import VlmixConfig
    from vlmix.models.loading import load
    from vlmix.models.modeling import VlmixForConditionalGeneration, VlmixModel
    from vlmix.models.processing import VlmixProcessor

__version__ = "0.1.0"
__all__ = ["VlmixConfig", "VlmixForConditionalGeneration", "VlmixModel", "VlmixProcessor", "load"]

_HOME = {
    "VlmixConfig": "vlmix.models.configuration",
    "VlmixForConditionalGeneration": "vlmix.models.modeling",
    "VlmixModel": "vlmix.models.modeling",
    "VlmixProcessor": "vlmix.models.processing",
    "load": "vlmix.models.loading",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'vlmix' has no attribute {name!r}")


_install()
