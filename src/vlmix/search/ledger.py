"""The trials that are done, one JSON line each, forced to disk before the next begins. No torch.

A line that a crash cut short is dropped when the file is opened; a damaged one anywhere else is an error, for
it would be a trial that somebody changed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field

from vlmix.core.errors import CheckpointError, RecipeError
from vlmix.core.files import storage_errors
from vlmix.core.settings import Settings, read_settings

SCHEMA = "vlmix.search_ledger/1"


class Seconds(Settings):
    """Measured seconds of a trial: all of it, its optimizer steps, the asking of questions."""

    total: float
    train: float
    judge: float


class Entry(Settings):
    """One finished trial, or one that cannot be trained (``error`` says why), which no ledger holds.

    ``figures`` are scores by ``benchmark.figure``, ``cost`` what a formula may call ``cost.NAME``. ``made``
    holds the seconds of each piece that others can take from it, by name; ``used`` the pieces that it took,
    with what part of a piece where that is less than 1.
    """

    key: str
    encoders: tuple[str, ...] = ()
    settings: dict[str, Any] = Field(default_factory=dict)
    seed: int = 0
    figures: dict[str, float] = Field(default_factory=dict)
    questions: int = 0
    cost: dict[str, float] = Field(default_factory=dict)
    seconds: Seconds
    made: dict[str, float] = Field(default_factory=dict)
    used: dict[str, float] = Field(default_factory=dict)
    error: str = ""


class _Line(Entry):
    """An entry with the name of its form, as it stands in the file."""

    schema_: Literal["vlmix.search_ledger/1"] = Field(alias="schema")


class Ledger:
    """``ledger.jsonl``: append-only; one process writes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.entries: dict[str, Entry] = {}

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read what is there and cut off a last line that is not whole.

        Raises:
            CheckpointError: if a line in the middle is damaged, or the file is of another kind.

        """
        ledger = cls(path)
        content = path.read_bytes() if path.is_file() else b""
        whole = content.rpartition(b"\n")[0] + b"\n" if b"\n" in content else b""
        lines = whole.splitlines()
        for number, line in enumerate(lines, 1):
            try:
                entry = read_settings(_Line, json.loads(line))
            except (ValueError, TypeError, RecipeError) as error:
                raise CheckpointError(
                    f"{path}, line {number}: not a trial of a search ({error}). Restore the file, or search "
                    "in another folder"
                ) from None
            ledger.entries[entry.key] = Entry(**entry.model_dump(exclude={"schema_"}))
        if len(whole) < len(content):
            with storage_errors(path), path.open("r+b") as file:
                file.truncate(len(whole))
                os.fsync(file.fileno())
        return ledger

    def add(self, entry: Entry) -> None:
        """Write a trial down; when this returns it is on disk.

        Raises:
            DiskFullError: if there is no room.

        """
        line = json.dumps({"schema": SCHEMA, **entry.model_dump(mode="json")}, allow_nan=False) + "\n"
        new = not self._path.exists()
        with storage_errors(self._path):
            with self._path.open("ab") as file:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
            if new:
                _sync(self._path.parent)
        self.entries[entry.key] = entry

    def note_failure(self, entry: Entry) -> None:
        """Remember a trial that failed; it is not written down, so that it is tried again next time."""
        self.entries[entry.key] = entry

    def made(self) -> Mapping[str, float]:
        """The seconds of each piece by name; where several trials made it, those of the first."""
        pieces: dict[str, float] = {}
        for entry in self.entries.values():
            for name, seconds in entry.made.items():
                pieces.setdefault(name, seconds)
        return pieces


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
