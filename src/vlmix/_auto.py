"""Lets transformers' Auto classes find vlmix after ``import vlmix``, without importing torch.

transformers has no plugin mechanism, and registering at import would cost seconds and torch. So a finder
waits for transformers' own Auto modules and imports ours, which register themselves at their end, right
after each one is executed; where they are already there, at once. ``modeling_layers``, which every model
imports first, imports an Auto module before it defines what models need: then ours wait for its end.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_AUTO = "transformers.models.auto."
_LAYERS = "transformers.modeling_layers"
_OURS = {
    _LAYERS: "vlmix.models.modeling",
    _AUTO + "configuration_auto": "vlmix.models.configuration",
    _AUTO + "modeling_auto": "vlmix.models.modeling",
    _AUTO + "processing_auto": "vlmix.models.processing",
}


def install() -> None:
    """Register now with what transformers has loaded, and later with what it has not."""
    for theirs, ours in _OURS.items():
        if theirs in sys.modules and not _running(_LAYERS):
            importlib.import_module(ours)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds transformers' Auto modules as the other finders do, and adds our step after execution."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _OURS:
            return None
        for finder in sys.meta_path:
            if isinstance(finder, _Finder):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _ThenImport(spec.loader, _OURS[fullname])
                return spec
        return None


class _ThenImport(Loader):
    """Executes a module as its own loader does, then imports ours, which registers itself with it."""

    def __init__(self, loader: Loader, ours: str) -> None:
        self.loader, self.ours = loader, ours

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        if module.__name__ == _LAYERS or not _running(_LAYERS):
            importlib.import_module(self.ours)


def _running(name: str) -> bool:
    """Whether a module is half imported: it is there, and its last line has not run."""
    module = sys.modules.get(name)
    return module is not None and not hasattr(module, "GradientCheckpointingLayer")
