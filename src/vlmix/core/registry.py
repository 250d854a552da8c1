"""Name -> class, found by file name: adding a part is adding one file, nothing else is edited.

The registry of encoders looks in the package ``vlmix.encoders``: the part called ``clip`` is the class
that ``vlmix/encoders/clip.py`` registers. A file is imported only when its part is asked for by name, so
listing imports neither torch nor any part. Other packages add parts through entry points of the group
that has the package's name.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from importlib.metadata import EntryPoint, distributions
from pathlib import Path
from typing import Generic, TypeVar

from vlmix.core.errors import UnknownNameError

T = TypeVar("T")


class Registry(Generic[T]):
    """The parts of one kind. ``word`` is what messages call them: ``encoder``, ``fusion`` …"""

    def __init__(self, package: str, word: str) -> None:
        self.package, self.word = package, word
        self._found: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator; inside our package ``name`` must be the file's name."""

        def add(cls: type[T]) -> type[T]:
            stem = cls.__module__.rpartition(".")[2]
            if cls.__module__.startswith(self.package + ".") and stem != name:
                raise ValueError(f"{cls.__module__} must register {stem!r}, not {name!r}")
            if self._found.get(name, cls) is not cls:
                raise ValueError(f"{name!r} is already {self._found[name].__qualname__}")
            self._found[name] = cls
            return cls

        return add

    def names(self) -> list[str]:
        """Every known name, sorted, found without importing any part."""
        return sorted({*self._files(), *self._plugins(), *self._found})

    def get(self, name: str) -> type[T]:
        """The class called ``name``.

        Raises:
            UnknownNameError: if no file, plugin or ``register`` call provides it.

        """
        if name not in self._found:
            if (plugin := self._plugins().get(name)) is not None:
                plugin.load()
            elif name in self._files():
                importlib.import_module(f"{self.package}.{name}")
        if name not in self._found:
            raise UnknownNameError(self.word, name, self.names())
        return self._found[name]

    def summary(self, name: str) -> str:
        """The first line of the part's file, read without importing it."""
        files = self._files()
        if name not in files:
            return ""
        doc = ast.get_docstring(ast.parse(files[name].read_text(encoding="utf-8"))) or ""
        return doc.partition("\n")[0]

    def _files(self) -> dict[str, Path]:
        spec = importlib.util.find_spec(self.package)
        folders = list(spec.submodule_search_locations or ()) if spec else []
        found = [(Path(folder), m.name) for folder in folders for m in pkgutil.iter_modules([folder])]
        return {name: folder / f"{name}.py" for folder, name in found if not name.startswith("_")}

    def _plugins(self) -> dict[str, EntryPoint]:
        return _installed().get(self.package, {})


@functools.cache
def _installed() -> dict[str, dict[str, EntryPoint]]:
    """What installed packages offer, by group and name; once, since it reads a file of each of them."""
    found: dict[str, dict[str, EntryPoint]] = {}
    for distribution in distributions():
        for point in distribution.entry_points:
            found.setdefault(point.group, {}).setdefault(point.name, point)  # the first on the path counts
    return found
