"""Reading a published folder: names and shapes first, then one tensor at a time; nothing in it is trusted."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlmix.convert._names import Box
from vlmix.core.errors import CheckpointError
from vlmix.core.pickles import as_safetensors
from vlmix.core.progress import Told, quiet

_PICKLED = "pytorch_model.bin"
# OpenCLIP's own names, and what the first stage of LLaVA and its descendants leaves.
_OTHERS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "mm_projector.bin")
_CONFIGS = ("config.json", "open_clip_config.json")


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies and what it looks like, from the file's header; ``size`` in bytes.

    ``source`` is the file that was given, where ``file`` is a copy of a pickled one.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    size: int
    source: Path


class PublishedFolder:
    """A folder of weights with its ``config.json``.

    ``scratch`` is an empty folder for copies of pickled files, which are read in a child process; ``stem`` is
    what safetensors files are called; ``towers`` are folders of encoders, by the names in the config.
    ``whole`` says that the authors' code reads just this folder, so that the way back gives it again, and
    ``decoder`` is the config of a decoder that lies in a folder of its own.
    """

    whole: bool = True
    decoder: Mapping[str, Any] | None = None

    def __init__(
        self,
        folder: Path,
        scratch: Path,
        stem: str = "model",
        *,
        towers: Mapping[str, Path] | None = None,
        told: Told = quiet,
    ) -> None:
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}: no such folder. Give the folder of a published checkpoint, as "
                "`hf download NAME --local-dir FOLDER` leaves it: nothing is downloaded here"
            )
        self.folder, self.scratch, self.stem = folder, scratch, stem
        self.towers, self.told, self.asked = dict(towers or {}), told, list[str]()

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """``config.json``, or nothing where there is none."""
        path = self.folder / "config.json"
        if not path.is_file():
            return {}
        return _object(path)

    @cached_property
    def generation(self) -> Mapping[str, Any]:
        """``generation_config.json``, or nothing where there is none."""
        path = self.folder / "generation_config.json"
        return _object(path) if path.is_file() else {}

    @cached_property
    def tensors(self) -> Mapping[str, Stored]:
        """Every tensor by name.

        Raises:
            CheckpointError: if there are no weights, a shard is missing, cut short or outside the folder, or
                two shards hold the same name.

        """
        return self.read(self._files())

    def read(self, files: Sequence[Path]) -> dict[str, Stored]:
        """Names, shapes and places of all tensors in some of the folder's files."""
        found: dict[str, Stored] = {}
        for path in files:
            readable = [path] if path.suffix == ".safetensors" else self._copies(path)
            for name, stored in (entry for copy in readable for entry in _header(copy)):
                if name in found:
                    raise CheckpointError(f"{path}: holds {name!r}, and so does {found[name].source.name}")
                found[name] = replace(stored, source=path)
        return found

    def tensor(self, name: str, box: Box = ()) -> Tensor:
        """One tensor or a part of it, read from disk."""
        return read_tensor(self.tensors[name], name, box)

    def tower(self, name: str) -> PublishedFolder | None:
        """The folder of an encoder that the config calls ``name``: given, or in or beside this one."""
        self.asked.append(name)
        given = self.towers.get(name) or self.towers.get(Path(name).name)
        near = [given] if given else [parent / name for parent in self._near() if name]
        for path in near:
            if given or any((path / config).is_file() for config in _CONFIGS):
                return PublishedFolder(path, self.scratch, told=self.told)
        return None

    @property
    def folders(self) -> list[Path]:
        """Where this lies."""
        return [self.folder]

    def _near(self) -> list[Path]:
        return list(dict.fromkeys(p for f in self.folders for p in (f, f.parent, Path())))

    def _files(self) -> list[Path]:
        plain = f"{self.stem}.safetensors"
        indexes = (f"{plain}.index.json", f"{_PICKLED}.index.json")
        for index in indexes:
            if (self.folder / index).is_file():
                return self._shards(self.folder / index)
        singles = (plain, _PICKLED, *_OTHERS)
        for name in singles:
            if (self.folder / name).is_file():
                return [self.folder / name]
        raise CheckpointError(
            f"{self.folder}: holds no weights; looked for {', '.join((*indexes, *singles))}"
        )

    def _shards(self, index: Path) -> list[Path]:
        found = _json(index)
        names = found.get("weight_map") if isinstance(found, dict) else None
        if not isinstance(names, dict) or not names:
            raise CheckpointError(f"{index}: has no `weight_map`")
        shards = []
        for name in sorted({*map(str, names.values())}):
            if Path(name).name != name or name in {".", ".."}:
                raise CheckpointError(f"{index}: {name!r} is not the name of a file in this folder")
            if not (self.folder / name).is_file():
                raise CheckpointError(f"{index}: names {name}, which is missing")
            shards.append(self.folder / name)
        return shards

    def _copies(self, path: Path) -> list[Path]:
        return as_safetensors(path, self.scratch, self.told)


def read_tensor(stored: Stored, name: str, box: Box = ()) -> Tensor:
    """The tensor called ``name`` in its file, or a part of it."""
    try:
        with safe_open(stored.file, framework="pt") as file:
            return file.get_slice(name)[box] if box else file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{stored.source}: cannot read {name!r}: {error}") from None


def _header(path: Path) -> Iterator[tuple[str, Stored]]:
    """Names, shapes and types of a safetensors file, checked against its length."""
    try:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > path.stat().st_size - 8:
                raise CheckpointError(f"{path}: is cut short or not a safetensors file")
            header = json.loads(file.read(length))
    except (OSError, struct.error, ValueError) as error:
        raise CheckpointError(f"{path}: is cut short or not a safetensors file: {error}") from None
    try:
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        spans = {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in entries.items()}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        found = [
            (n, Stored(path, tuple(e["shape"]), str(e["dtype"]), spans[n], path)) for n, e in entries.items()
        ]
    except (AttributeError, KeyError, TypeError, IndexError):
        raise CheckpointError(f"{path}: its header is damaged") from None
    size = path.stat().st_size
    if size != 8 + length + end:
        raise CheckpointError(f"{path}: has {size} bytes, its header says {8 + length + end}")
    yield from found


def _object(path: Path) -> Mapping[str, Any]:
    found = _json(path)
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: must be an object")
    return found


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
