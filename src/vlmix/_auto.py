"""Lets transformers' Auto classes find vlmix after ``import vlmix``, without importing torch.

transformers has no plugin mechanism, and registering at import would cost seconds and torch. So a finder
waits for transformers' own Auto modules and imports ours, which register themselves at their end, right
after each one is executed; where they are already there, at once. ``modeling_layers``, which every model
imports first, and ``peft``, which transformers' trainer imports, import an Auto module before they define
what ours need: then ours wait for their end.
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
# For each of theirs a name that it has once it is whole, and ours. Ours need the first two.
_OURS = {
    "transformers.modeling_layers": ("GradientCheckpointingLayer", "vlmix.models.modeling"),
    "peft": ("inject_adapter_in_model", "vlmix.models.modeling"),
    _AUTO + "configuration_auto": ("AutoConfig", "vlmix.models.configuration"),
    _AUTO + "modeling_auto": ("AutoModelForImageTextToText", "vlmix.models.modeling"),
    _AUTO + "processing_auto": ("AutoProcessor", "vlmix.models.processing"),
}
# What ours need whole, with the last name that they need of it; one of them is our own, and asks for theirs.
_NEEDED = {
    "transformers.modeling_layers": "GradientCheckpointingLayer",
    "peft": "inject_adapter_in_model",
    "vlmix.models.adapters": "install_adapters",
}


def install() -> None:
    """Register now with what transformers has loaded, and later with what it has not."""
    _register()
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    """Import ours beside each of theirs that is whole, unless something that ours need is half imported."""
    if not all(_whole(name, last) for name, last in _NEEDED.items() if name in sys.modules):
        return
    for theirs, (last, ours) in _OURS.items():
        if theirs in sys.modules and _whole(theirs, last):
            importlib.import_module(ours)


def _whole(name: str, last: str) -> bool:
    return last in vars(sys.modules[name])


class _Finder(MetaPathFinder):
    """Finds transformers' Auto modules as the other finders do, and adds our step after execution."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in {*_OURS, *_NEEDED}:
            return None
        for finder in sys.meta_path:
            if isinstance(finder, _Finder):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _ThenImport(spec.loader)
                return spec
        return None


class _ThenImport(Loader):
    """Executes a module as its own loader does, then imports ours, which register themselves."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register()
