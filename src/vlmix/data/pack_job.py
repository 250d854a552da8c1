"""Packing that can be stopped: rows go to shards, and what is finished is noted and never redone."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from vlmix.core.errors import InputError
from vlmix.core.files import read_json, recover, write_json
from vlmix.core.interfaces import Source
from vlmix.data.ledger import FILE_NAME, Ledger

_SCHEMA: Final = "vlmix.packing/1"
_SHARDS: Final = "shards"
_HEADER_BYTES: Final = 1024  # of a member: its header and what fills its last block, at most


@dataclass(frozen=True, slots=True)
class Packed:
    """One row ready to be written: its JSON and its pictures by their endings; or why it is left out."""

    index: int
    line: int
    name: str
    reason: str = ""
    row: bytes = b""
    pictures: tuple[tuple[str, bytes], ...] = ()

    def members(self) -> Iterator[tuple[str, bytes]]:
        """Its JSON, then its pictures."""
        yield "json", self.row
        yield from self.pictures


class PackJob:
    """What is done of one packing, below ``folder``: finished ``shards``, and a note of how they came about.

    ``about`` is all that decides their bytes: a note of another packing counts for nothing. ``row`` is the
    first row that is in no finished shard.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.shards, self.row = folder / _SHARDS, 0
        self.finished: list[int] = []
        self._note, self._about = folder / "progress.json", _digest(about)

    def begin(self, max_bad: float) -> Ledger:
        """Take up what a packing that was stopped has left, and return the ledger it had then."""
        for folder in (self.shards.parent, self.shards):
            recover(folder)
        note, bad_rows = self._noted(), self.shards / FILE_NAME
        if note is None:
            shutil.rmtree(self.shards, ignore_errors=True)
            self.shards.mkdir()
            return Ledger(bad_rows, max_bad=max_bad)
        self.row, self.finished = note["row"], note["shards"]
        if bad_rows.exists():
            os.truncate(bad_rows, note["bad_bytes"])
        return Ledger.from_dict(bad_rows, note["ledger"], max_bad=max_bad)

    def note(self, row: int, ledger: Ledger) -> None:
        """Another shard is finished; ``row`` is the first that is not in it."""
        path, bad_rows = shard_path(self.shards, len(self.finished)), self.shards / FILE_NAME
        written = [each for each in (path, bad_rows) if each.exists()]
        for each in written:
            with each.open("rb") as file:
                os.fsync(file.fileno())
        self.finished.append(path.stat().st_size)
        self.row = row
        bad_bytes = bad_rows.stat().st_size if bad_rows in written else 0
        done = {"row": row, "shards": self.finished, "bad_bytes": bad_bytes, "ledger": ledger.to_dict()}
        write_json(self._note, {"schema": _SCHEMA, "about": self._about, **done})

    def end(self) -> None:
        """All is in its place: nothing is left to go on with."""
        self._note.unlink(missing_ok=True)

    def leave(self) -> None:
        """Stopped: what is finished stays, a beginning does not."""
        if not self.finished:
            shutil.rmtree(self.shards, ignore_errors=True)

    def _noted(self) -> dict[str, Any] | None:
        """The note of this very packing, if what it says is there."""
        try:
            note = read_json(self._note)
            same = (note["schema"], note["about"]) == (_SCHEMA, self._about)
            sizes = [shard_path(self.shards, number).stat().st_size for number in range(len(note["shards"]))]
            bad_rows = self.shards / FILE_NAME
            listed = bad_rows.stat().st_size if bad_rows.exists() else 0
            return note if same and sizes == note["shards"] and listed >= note["bad_bytes"] else None
        except (InputError, OSError, KeyError, TypeError):
            return None


class ShardWriter:
    """Tar files of about one size, equal for equal rows: no clock and no user is written."""

    def __init__(self, job: PackJob, ledger: Ledger, most: int) -> None:
        self.job, self.ledger, self.most = job, ledger, most
        self.count, self._size = len(job.finished), 0
        self._tar: tarfile.TarFile | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tar is not None:
            self._tar.close()

    def take(self, row: Packed, source: str) -> None:
        """Write one row, to a new shard where this one is full, or down as a bad one of ``source``."""
        if row.reason:
            self.ledger.quarantine((source, row.index), row.line, row.name, row.reason)
            return
        size = sum(len(raw) + _HEADER_BYTES for _, raw in row.members())
        if self._tar is None or (self._size and self._size + size > self.most):
            self._next(row.index)
        self._size += size
        for tail, raw in row.members():
            info = tarfile.TarInfo(f"{self.ledger.used:09d}.{tail}")
            info.size = len(raw)
            if self._tar is not None:
                self._tar.addfile(info, io.BytesIO(raw))
        self.ledger.used += 1

    def _next(self, row: int) -> None:
        if self._tar is not None:
            self._tar.close()
            self.job.note(row, self.ledger)
        path = shard_path(self.job.shards, self.count)
        self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 - closed by the next
        self.count, self._size = self.count + 1, 0


def tidy(folder: Path) -> None:
    """Remove what a packing left that was killed after its shards had found their place."""
    if not (folder / _SHARDS).exists():
        shutil.rmtree(folder, ignore_errors=True)


def shard_path(folder: Path, number: int) -> Path:
    """Where shard ``number`` lies."""
    return folder / f"{number:06d}.tar"


def seen_files(source: Source) -> list[tuple[str, int, int]]:
    """Size and time of the last change of every file a source reads, pictures in folders aside."""
    places = sorted({*type(source).places(source.settings)})
    files = [file for place in places for file in ([place] if place.is_file() else _tables(place))]
    stats = [(str(file), file.stat()) for file in files]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def _tables(folder: Path) -> list[Path]:
    """The files directly in a folder that hold rows."""
    return sorted(
        file for file in folder.glob("*") if file.suffix in {".parquet", ".arrow", ".json", ".jsonl"}
    )


def _digest(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
