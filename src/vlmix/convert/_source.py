"""Reading a published folder: names and shapes first, then one tensor at a time; nothing in it is trusted."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlmix.convert._pickles import as_safetensors
from vlmix.core.errors import CheckpointError

_PICKLED, _OPEN_CLIP = "pytorch_model.bin", ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies and what it looks like, from the file's header."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class PublishedFolder:
    """A folder of weights with its ``config.json``.

    ``scratch`` is an empty folder for copies of pickled files, which are read in a child process; ``stem`` is
    what safetensors files are called.
    """

    def __init__(self, folder: Path, scratch: Path, stem: str = "model") -> None:
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder. Give the folder of a published checkpoint")
        self.folder, self.scratch, self.stem = folder, scratch, stem

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """``config.json``, or nothing where there is none."""
        path = self.folder / "config.json"
        if not path.is_file():
            return {}
        found = _json(path)
        if not isinstance(found, dict):
            raise CheckpointError(f"{path}: must be an object")
        return found

    @cached_property
    def tensors(self) -> Mapping[str, Stored]:
        """Every tensor by name.

        Raises:
            CheckpointError: if there are no weights, a shard is missing, cut short or outside the folder, or
                two shards hold the same name.

        """
        found: dict[str, Stored] = {}
        for path in self._files():
            for name, stored in _header(self._readable(path)):
                if name in found:
                    raise CheckpointError(f"{path}: holds {name!r}, and so does {found[name].file.name}")
                found[name] = stored
        return found

    def tensor(self, name: str) -> Tensor:
        """One tensor, read from disk."""
        stored = self.tensors[name]
        try:
            with safe_open(stored.file, framework="pt") as file:
                return file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{stored.file}: cannot read {name!r}: {error}") from None

    def _files(self) -> list[Path]:
        plain = f"{self.stem}.safetensors"
        indexes = (f"{plain}.index.json", f"{_PICKLED}.index.json")
        for index in indexes:
            if (self.folder / index).is_file():
                return self._shards(self.folder / index)
        singles = (plain, _PICKLED, *_OPEN_CLIP)
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

    def _readable(self, path: Path) -> Path:
        return path if path.suffix == ".safetensors" else as_safetensors(path, self.scratch)


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
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    try:
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        found = [(n, Stored(path, tuple(e["shape"]), str(e["dtype"]))) for n, e in entries.items()]
    except (KeyError, TypeError, IndexError):
        raise CheckpointError(f"{path}: its header is damaged") from None
    size = path.stat().st_size
    if size != 8 + length + end:
        raise CheckpointError(f"{path}: has {size} bytes, its header says {8 + length + end}")
    yield from found


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
