"""Files that hold what an encoder said about a picture: read at once, written whole, the oldest thrown away.

One safetensors file for each picture and encoder, ``ENCODER/AB/REST.safetensors``. Any number of processes
may read and write one folder. Whatever is wrong with a file, it counts as absent and is written anew.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import torch
from safetensors.torch import save
from torch import Tensor

SCHEMA = "vlmix.features/1"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FOLDER = re.compile(r"[0-9a-f]{32}")
_SHELF = re.compile(r"[0-9a-f]{2}")
_FILE = re.compile(r"[0-9a-f]{62}\.safetensors")
_UNFINISHED = re.compile(r"[0-9a-f]{62}\.[0-9a-f]{32}\.unfinished")
_LONGEST_HEADER = 1 << 16
_HOUR = 3600
_ROOM_LEFT = 0.1  # share of the limit that throwing away makes free
_DISK_LEFT = 0.05  # share of the disk that is left to others, checkpoints among them
_RECOUNT = 0.01  # share of the limit after which a count of the folder is believed no longer


def place(folder: Path, encoder: str, picture: str) -> Path:
    """The file of one encoder's answer to one picture."""
    return folder / encoder / picture[:2] / f"{picture[2:]}.safetensors"


def read_tensors(path: Path, picture: str) -> list[Tensor] | None:
    """The tensors of a file in order, or ``None`` if it is absent, damaged or another's."""
    try:
        with path.open("rb") as file:
            content = bytearray(os.fstat(file.fileno()).st_size)
            if file.readinto(content) != len(content):
                return None
        found = _parsed(content, picture)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        return None
    try:
        os.utime(path)
    except OSError:  # read-only, or thrown away meanwhile
        return found
    return found


class FeatureStore:
    """Writes below ``folder``, ``limit`` bytes at most, as one of ``writers`` processes.

    When it is full, files go that nobody used since this store was opened, the oldest used first. Where all
    were, nothing more is stored: in random order a part that stays is found again more often than one that
    changes. ``say`` is told, once, why nothing more is stored.
    """

    def __init__(self, folder: Path, limit: int, say: Callable[[str], None], writers: int = 1) -> None:
        self.folder, self.limit, self.writers, self.say = folder, limit, writers, say
        self.is_open = True
        self._room: int | None = None
        self._began = 0.0

    def write(self, encoder: str, picture: str, tensors: Sequence[Tensor]) -> None:
        """Store one answer; a full or failing disk ends storing, never the run."""
        if not self.is_open:
            return
        path = place(self.folder, encoder, picture)
        content = _content(picture, tensors)
        temporary = path.with_name(f"{path.stem}.{uuid4().hex}.unfinished")
        try:
            if not self._takes(len(content)):
                self._close(f"{self.folder} is full and all of it is in use; the rest is computed each time")
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(content)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            self._close(f"{self.folder} takes no more ({error.strerror}); the rest is computed each time")

    def size(self) -> int:
        """Bytes of all files."""
        return sum(stat.st_size for _, stat in self._files())

    def _close(self, why: str) -> None:
        self.is_open = False
        self.say(f"features: {why}")

    def _takes(self, size: int) -> bool:
        if self._room is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._began = _now(self.folder)
        if self._room is None or self._room < size:
            self._room = self._counted(size)
        self._room -= size
        return self._room >= 0

    def _counted(self, size: int) -> int:
        """Bytes to write before the folder is counted again: this writer's share of the room there is."""
        disk = shutil.disk_usage(self.folder)
        spare = disk.free - int(_DISK_LEFT * disk.total)
        room = min(self.limit - self.size(), spare)
        if room < size:
            room += self._throw_away(int(_ROOM_LEFT * self.limit) + size - room)
        return min(room, max(room // self.writers, int(_RECOUNT * self.limit), size))

    def _throw_away(self, wanted: int) -> int:
        """Delete what was not used since the store was opened, the oldest used first, and say how much."""
        old = [(stat.st_mtime, stat.st_size, path) for path, stat in self._files()]
        freed = 0
        for used, size, path in sorted(old):
            if freed >= wanted or used >= self._began:
                break
            Path(path).unlink(missing_ok=True)
            freed += size
        return freed

    def _files(self) -> Iterator[tuple[str, os.stat_result]]:
        """The store's own files; what a killed writer left is removed, what is foreign is passed over."""
        for encoder in _listed(self.folder, _FOLDER):
            for shelf in _listed(encoder.path, _SHELF):
                for entry in _listed(shelf.path, _UNFINISHED):
                    if (stat := _stat(entry)) and stat.st_mtime < time.time() - _HOUR:
                        Path(entry.path).unlink(missing_ok=True)
                for entry in _listed(shelf.path, _FILE):
                    if stat := _stat(entry):
                        yield entry.path, stat


def _listed(folder: Path | str, names: re.Pattern[str]) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if names.fullmatch(entry.name)]
    except OSError:
        return []


def _stat(entry: os.DirEntry[str]) -> os.stat_result | None:
    try:
        return entry.stat(follow_symlinks=False)
    except OSError:  # another process threw it away
        return None


def _now(folder: Path) -> float:
    """The time by the clock that stamps files there."""
    probe = folder / f".{uuid4().hex}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _content(picture: str, tensors: Sequence[Tensor]) -> bytes:
    named = {str(number): tensor.detach().cpu().contiguous() for number, tensor in enumerate(tensors)}
    sums = [zlib.crc32(raw_bytes(tensor)) for tensor in named.values()]
    return save(named, {"schema": SCHEMA, "picture": picture, "sums": json.dumps(sums)})


def raw_bytes(tensor: Tensor) -> memoryview:
    """The memory of a tensor on the CPU, copied only where it is not in one piece."""
    return cast("Any", tensor.contiguous().reshape(-1).view(torch.uint8).numpy()).data


def _parsed(content: bytearray, picture: str) -> list[Tensor] | None:
    """Tensors that share ``content``, as the safetensors format lays them out."""
    length = int.from_bytes(content[:8], "little")
    if length > _LONGEST_HEADER:
        return None
    header = json.loads(bytes(content[8 : 8 + length]))
    about = header.pop("__metadata__")
    if about["schema"] != SCHEMA or about["picture"] != picture:
        return None
    tensors: list[Tensor] = []
    for number, total in enumerate(json.loads(about["sums"])):
        item = header[str(number)]
        start, end = (8 + length + at for at in item["data_offsets"])
        if end > len(content) or zlib.crc32(memoryview(content)[start:end]) != total:
            return None
        raw = torch.frombuffer(content, dtype=torch.uint8, count=end - start, offset=start)
        tensors.append(raw.view(_DTYPES[item["dtype"]]).view(item["shape"]))
    return tensors
