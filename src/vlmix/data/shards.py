"""Tar shards by row: which members a row has and where they lie, found by one look at the headers.

Members that share a name up to its first dot are one row, as webdataset has it. The index is kept beside the
shard (``NAME.tar.index``) or in a folder of its own, as JSON lines, and made again when the shard changes.
Files are opened for each reading, so a `Shard` may go to any thread or process.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import IO, Any, Final

from vlmix.core.errors import DataError, DiskFullError, ImageError, InputError
from vlmix.core.files import write_bytes
from vlmix.core.images import MAX_FILE_BYTES
from vlmix.core.stored import StoredPicture
from vlmix.data.tar_headers import BLOCK, TarCutError, members

_SCHEMA: Final = "vlmix.shard_index/1"
_MAX_SHARDS: Final = 1_000_000
_RANGE: Final = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}|\{([^{}]*,[^{}]*)\}")
_PACKED: Final = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}
Version = tuple[int, int]
"""Size in bytes and time of the last change in nanoseconds."""


@dataclass(frozen=True, slots=True)
class Stretch(StoredPicture):
    """Bytes of a shard: a member's ``name``, where it begins and how many bytes it has."""

    shard: Path
    version: Version
    member: str
    offset: int
    size: int

    @property
    def name(self) -> str:
        """The shard's name and the member's."""
        return f"{self.shard.name}: {self.member}"

    def open(self) -> IO[bytes]:
        """The member's bytes, read from the shard when asked for.

        Raises:
            ImageError: if they are more than a picture may have.
            DataError: if the shard was changed after it was looked through.

        """
        if self.size > MAX_FILE_BYTES:
            raise ImageError(
                f"{self.name} has {self.size} bytes, more than {MAX_FILE_BYTES}. Save it smaller."
            )
        return io.BytesIO(self.read())

    def read(self) -> bytes:
        """All bytes; the caller has looked at ``size``."""
        try:
            raw = self._read()
        except OSError as error:
            raise DataError(
                f"{self.shard} cannot be read any more: {error.strerror}. Bring it back and continue with "
                "--resume"
            ) from None
        if len(raw) != self.size:
            raise DataError(f"{self.shard}: {self.member} gave {len(raw)} bytes of {self.size}")
        return raw

    def _read(self) -> bytes:
        descriptor = os.open(self.shard, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if _version(os.fstat(descriptor)) != self.version:
                raise DataError(
                    f"{self.shard} was changed while in use. Start again to read the new version."
                )
            return os.pread(descriptor, self.size, self.offset)
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class ShardRow:
    """One row: its key, its members by what follows the key, and why it cannot be used, if so."""

    key: str
    members: dict[str, Stretch]
    refused: str = ""


class Shard:
    """One tar file by row; its headers are read once, when it is opened for the first time.

    Raises:
        InputError: if it is missing, packed or no regular file.

    """

    def __init__(self, path: Path, index: Path | None = None) -> None:
        self.path = path
        self._index_path = path.with_name(f"{path.name}.index")
        if index is not None:
            digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
            self._index_path = index / f"{path.name}.{digest}.index"
        self.version = _checked(path)
        self._lines = self._read_index() or self._made()
        self._starts = array("Q", (match.start() for match in re.finditer(rb"(?m)^\[", self._lines)))

    def __len__(self) -> int:
        """Rows of the shard, bad ones included."""
        return len(self._starts)

    def row(self, number: int) -> ShardRow:
        """Row ``number``, by its members' places; none of them is read.

        Raises:
            InputError: if the index is damaged.

        """
        start = self._starts[number]
        try:
            key, listed, refused = json.loads(self._lines[start : self._lines.index(b"\n", start)])
            found = {str(tail): self._stretch(key, tail, *place) for tail, *place in listed}
        except (ValueError, TypeError):
            raise InputError(f"{self._index_path} is damaged. Delete it; it is made again.") from None
        return ShardRow(str(key), found, str(refused))

    def _stretch(self, key: str, tail: str, offset: int, size: int) -> Stretch:
        if not 0 <= offset <= offset + size <= self.version[0]:
            raise ValueError("outside the shard")
        return Stretch(self.path, self.version, f"{key}.{tail}", offset, size)

    def _read_index(self) -> bytes:
        """The rows that an index on disk lists, if it is whole and of this version of the shard."""
        most = self.version[0] * 4 + BLOCK  # a header of 512 bytes gives some hundred bytes of index
        try:
            if self._index_path.stat().st_size > most:
                return b""
            head, _, lines = self._index_path.read_bytes().partition(b"\n")
            wanted = _head(self.version, lines)
        except OSError:
            return b""
        return lines if head + b"\n" == wanted else b""

    def _made(self) -> bytes:
        """Look through the headers, and keep what was found where that is possible."""
        rows = _rows(self.path)
        lines = b"".join(json.dumps(row, separators=(",", ":")).encode() + b"\n" for row in rows)
        try:
            self._index_path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(self._index_path, _head(self.version, lines) + lines)
        except (OSError, DiskFullError):
            return lines  # a folder that cannot be written: the next process looks again
        return lines


def find_shards(patterns: Sequence[str]) -> list[Path]:
    """The files that patterns mean: a file, a folder of ``*.tar``, ``*``, ``?``, ``{000..003}``, ``{a,b}``.

    Raises:
        InputError: if one of them finds nothing.

    """
    found = list[Path]()
    for pattern in patterns:
        names = [pattern] if Path(pattern).exists() else _unfolded(pattern)
        shards = [path for name in names for path in _matching(name)]
        if not shards:
            raise InputError(
                f"{pattern}: no tar shards there. Give a folder, a file or a pattern as {{0..9}}.tar"
            )
        found += shards
    if twice := [path for path, count in Counter(found).items() if count > 1]:
        raise InputError(f"{twice[0]} is named twice; its rows would be drawn twice")
    return found


def named_shards(patterns: Sequence[str]) -> list[Path]:
    """The files that patterns name, there or not; where a folder or ``*`` finds none, that itself."""
    found = list[Path]()
    for pattern in patterns:
        for name in [pattern] if Path(pattern).exists() else _unfolded(pattern):
            path = Path(name)
            if path.is_dir():
                found += sorted(path.glob("*.tar")) or [path]
            elif not path.exists() and glob.has_magic(name):
                found += sorted(map(Path, glob.glob(name))) or [path]  # noqa: PTH207 - as in `_matching`
            else:
                found.append(path)
    return found


def _unfolded(pattern: str) -> Iterator[str]:
    pieces = list[list[str]]()
    done = 0
    for match in _RANGE.finditer(pattern):
        first, last, words = match.groups()
        if words is None:
            if int(last) - int(first) >= _MAX_SHARDS:
                raise InputError(f"{pattern}: more than {_MAX_SHARDS} shards")
            choices = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
        else:
            choices = words.split(",")
        pieces += [[pattern[done : match.start()]], choices]
        done = match.end()
    return map("".join, product(*pieces, [pattern[done:]]))


def _matching(name: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        if not (found := sorted(path.glob("*.tar"))) and any(path.glob("*.t*gz")):
            raise InputError(f"{name}: its shards are packed. Unpack them first: gunzip {name}/*.tar.gz")
        return found
    if not path.exists() and glob.has_magic(name):
        return sorted(map(Path, glob.glob(name)))  # noqa: PTH207 - a pattern may begin anywhere
    if not path.exists() and "://" in name:
        raise InputError(f"{name} is no file here. Shards are read at a place: mount or download them first.")
    if not path.exists():
        raise InputError(f"{name} does not exist. Check the path.")
    return [path]


def _checked(path: Path) -> Version:
    try:
        if not path.is_file():
            raise InputError(f"{path} is not a regular file. Give tar files.")
        with path.open("rb") as file:
            head, info = file.read(8), os.fstat(file.fileno())
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}). Check the path.") from None
    for magic, (packing, remedy) in _PACKED.items():
        if head.startswith(magic):
            raise InputError(
                f"{path} is packed with {packing}, so its rows cannot be reached one by one. Unpack it "
                f"first: {remedy} {path}"
            )
    return _version(info)


def _version(info: os.stat_result) -> Version:
    return info.st_size, info.st_mtime_ns


def _head(version: Version, lines: bytes) -> bytes:
    head = {"schema": _SCHEMA, "version": version, "sha256": hashlib.sha256(lines).hexdigest()}
    return json.dumps(head, sort_keys=True).encode() + b"\n"


def _rows(path: Path) -> list[list[Any]]:
    """``[key, [[tail, offset, size] …], why refused]`` of every row, in the order of their first members."""
    rows, newest = list[list[Any]](), dict[str, list[Any]]()

    def row_of(key: str) -> list[Any]:
        if key not in newest:
            newest[key] = [key, [], ""]
            rows.append(newest[key])
        return newest[key]

    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for member in members(descriptor):
            key, tail = _split(member.name)
            if not tail:
                continue
            row = row_of(key)
            if any(tail == other for other, *_ in row[1]):
                del newest[key]
                row = row_of(key)
                row[2] = f"{member.name} stands twice in {path.name}"
            row[1].append([tail, member.offset, member.size])
            if member.refused:
                row[2] = f"{member.name} in {path.name}: {member.refused}"
    except TarCutError as cut:
        row_of(_split(cut.name)[0])[2] = (
            f"{path.name}: {cut.reason}. What is behind it is lost: get it again."
        )
    finally:
        os.close(descriptor)
    return rows


def _split(name: str) -> tuple[str, str]:
    """The key and what follows it; nothing follows where a member belongs to no row.

    That is one without an ending, one whose name begins with a dot, and ``__meta__`` as webdataset writes it.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, tail = base.partition(".")
    if not stem or (stem.startswith("__") and stem.endswith("__")):
        return name, ""
    return folder + slash + stem, tail.lower()
