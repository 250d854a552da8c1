"""Tensors in files that hold whole tensors or pieces of them, written by each process and read by slice.

A file's header says where its pieces lie in the whole, so that any number of processes can read what any
other number wrote; a file without that, like those of a transformers folder, holds whole tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from vlmix.core.errors import CheckpointError

_HEADER = "pieces"


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a piece lies: ``shape`` of the whole tensor, ``start`` and ``size`` of the piece."""

    shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]

    def overlap(self, other: Extent) -> tuple[slice, ...] | None:
        """The part of the whole that both hold, if any."""
        low = tuple(map(max, self.start, other.start))
        ends = zip(self.start, self.size, other.start, other.size, strict=True)
        high = tuple(min(a + n, b + m) for a, n, b, m in ends)
        parts = tuple(slice(*pair) for pair in zip(low, high, strict=True))
        return parts if all(part.start < part.stop for part in parts) else None

    def inside(self, parts: tuple[slice, ...]) -> tuple[slice, ...]:
        """``parts`` of the whole as they are counted in this piece."""
        return tuple(slice(p.start - s, p.stop - s) for p, s in zip(parts, self.start, strict=True))


@dataclass(frozen=True, slots=True)
class _Piece:
    path: Path
    extent: Extent


def extent_of(tensor: Tensor) -> Extent:
    """Where what this process holds lies in the whole.

    Raises:
        CheckpointError: if it is divided in a way that pieces cannot describe.

    """
    shape = tuple(tensor.shape)
    start, size = [0] * len(shape), list(shape)
    if isinstance(tensor, DTensor):
        for axis, placement in enumerate(tensor.placements):
            if isinstance(placement, Shard):
                most = math.ceil(size[placement.dim] / tensor.device_mesh.size(axis))
                first = min(most * tensor.device_mesh.get_local_rank(axis), size[placement.dim])
                size[placement.dim] = min(most, size[placement.dim] - first)
                start[placement.dim] += first
            elif not isinstance(placement, Replicate):
                raise CheckpointError(f"a tensor placed as {placement} cannot be saved in pieces")
        if tuple(size) != tuple(tensor.to_local().shape):
            raise CheckpointError(f"a tensor placed as {tensor.placements} cannot be saved in pieces")
    return Extent(shape, tuple(start), tuple(size))


def local(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def file_name(stem: str, rank: int, world: int) -> str:
    """The file of process ``rank``; alone, just the stem."""
    return f"{stem}.safetensors" if world == 1 else f"{stem}-{rank + 1:05d}-of-{world:05d}.safetensors"


def write(folder: Path, stem: str, tensors: Mapping[str, Tensor], rank: int, world: int) -> Path:
    """Write what this process holds of ``tensors``, each piece once in all files together."""
    path = folder / file_name(stem, rank, world)
    mine = {name: tensor for name, tensor in tensors.items() if _is_mine(tensor, rank)}
    stored = {name: local(tensor).detach().cpu().contiguous() for name, tensor in mine.items()}
    if world == 1:
        save_file(stored, path)
        return path
    extents = {name: extent_of(tensor) for name, tensor in mine.items()}
    header = {name: {"shape": e.shape, "start": e.start} for name, e in extents.items()}
    save_file(stored, path, {_HEADER: json.dumps(header, sort_keys=True)})
    return path


def write_own(folder: Path, stem: str, tensors: Mapping[str, Tensor], rank: int, world: int) -> Path:
    """Write tensors that belong to this process alone."""
    path = folder / file_name(stem, rank, world)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    return path


def _is_mine(tensor: Tensor, rank: int) -> bool:
    """Of copies the first is written; of what has no rows here, nothing."""
    if not isinstance(tensor, DTensor):
        return rank == 0
    copies = (axis for axis, placement in enumerate(tensor.placements) if not isinstance(placement, Shard))
    first = all(tensor.device_mesh.get_local_rank(axis) == 0 for axis in copies)
    return first and 0 not in tensor.to_local().shape


class Stored:
    """The tensors of all files of one stem in a folder."""

    def __init__(self, folder: Path, stem: str) -> None:
        """Read the headers alone.

        Raises:
            CheckpointError: if files or pieces are missing.

        """
        self.folder = folder
        self._pieces: dict[str, list[_Piece]] = {}
        for path in _files(folder, stem):
            with safe_open(path, "pt") as file:
                said = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    size = tuple(file.get_slice(name).get_shape())
                    where = said.get(name, {"shape": size, "start": [0] * len(size)})
                    extent = Extent(tuple(where["shape"]), tuple(where["start"]), size)
                    self._pieces.setdefault(name, []).append(_Piece(path, extent))
        for name, pieces in self._pieces.items():
            if sum(math.prod(p.extent.size) for p in pieces) != math.prod(self.shape(name)):
                raise CheckpointError(f"{folder}: pieces of {name} are missing")

    @property
    def names(self) -> set[str]:
        """Every tensor there is."""
        return set(self._pieces)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        return self._pieces[name][0].extent.shape

    def dtype(self, name: str) -> torch.dtype:
        """The type of its numbers."""
        with safe_open(self._pieces[name][0].path, "pt") as file:
            return file.get_slice(name)[:0].dtype if self.shape(name) else file.get_tensor(name).dtype

    def read(self, name: str) -> Tensor:
        """All of a tensor."""
        found = torch.empty(self.shape(name), dtype=self.dtype(name))
        self.fill(name, found)
        return found

    def fill(self, name: str, tensor: Tensor) -> None:
        """Copy into ``tensor`` what this process holds of it, and read no more than that."""
        wanted, target = extent_of(tensor), local(tensor.detach())
        for piece in self._pieces[name]:
            parts = wanted.overlap(piece.extent)
            if parts is not None:
                with safe_open(piece.path, "pt") as file:
                    target[wanted.inside(parts)].copy_(_read(file, name, piece.extent.inside(parts)))


def _read(file: Any, name: str, parts: tuple[slice, ...]) -> Tensor:
    return file.get_slice(name)[parts] if parts else file.get_tensor(name)


def _files(folder: Path, stem: str) -> list[Path]:
    alone = folder / f"{stem}.safetensors"
    found = [alone] if alone.is_file() else sorted(folder.glob(f"{stem}-*-of-*.safetensors"))
    if not found or (found != [alone] and len(found) != int(found[0].stem.rpartition("-")[2])):
        raise CheckpointError(f"{folder} does not hold all files of {stem}.safetensors")
    return found
