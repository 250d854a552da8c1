"""The quarantine ledger: every bad row is written down with its reason, none is ever replaced by another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Self

from vlmix.core.errors import DataError, ImageError, SampleError
from vlmix.core.files import storage_errors
from vlmix.core.interfaces import Source
from vlmix.core.sample import ImageRef, Sample, Turn

FILE_NAME: Final = "quarantine.jsonl"
Row = tuple[str, int]


class Ledger:
    """Counts rows as they are read, so that ``read == used + quarantined`` holds at any moment.

    The counts are of readings: a row met in three epochs counts three times. ``bad`` are different rows;
    each stands once in the file, whatever the number of epochs and resumed runs. ``path`` may be None to keep
    the rows in memory only. Bad rows stop the work when they are more than ``allowance`` different ones and
    more than the share ``max_bad`` of what was read.
    """

    def __init__(self, path: Path | None, *, max_bad: float = 0.01, allowance: int = 10) -> None:
        self.path, self.max_bad, self.allowance = path, max_bad, allowance
        self.used = 0
        self.quarantined = 0
        self.bad: dict[Row, str] = {}
        self._written = set[Row]() if path is None else _rows_in(path)

    @property
    def read(self) -> int:
        """Rows read so far, good and bad."""
        return self.used + self.quarantined

    def take(self, name: str, source: Source, index: int) -> Sample | None:
        """Read row ``index`` of the source called ``name`` with its pictures decoded, or write it down.

        Returns None for a row that was quarantined.

        Raises:
            DataError: if too many rows are bad.

        """
        line = source.line(index)
        try:
            sample = source[index]
        except SampleError as error:
            self.quarantine((name, index), line, error.sample_id, error.reason)
            return None
        try:
            decoded = with_open_images(sample)
        except ImageError as error:
            self.quarantine((name, index), line, sample.id, str(error))
            return None
        self.used += 1
        return decoded

    def quarantine(self, row: Row, line: int, sample_id: str, reason: str) -> None:
        """Count one bad reading of ``row`` (source name, index), and write the row down the first time.

        Raises:
            DataError: if too many rows are bad.

        """
        self.quarantined += 1
        self.bad[row] = reason
        if row not in self._written:
            self._written.add(row)
            self._append({"source": row[0], "row": row[1], "line": line, "id": sample_id, "reason": reason})
        if len(self.bad) > self.allowance and self.quarantined > self.max_bad * self.read:
            where = f"They are listed in {self.path}." if self.path else f"The last one: {reason}."
            raise DataError(
                f"{self.quarantined} of {self.read} rows read are bad ({len(self.bad)} different ones), more "
                f"than {self.allowance} and more than {self.max_bad:.2%}. {where} Mend or remove them, "
                "or raise max_bad."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the counts for a checkpoint."""
        bad = [[name, index, reason] for (name, index), reason in self.bad.items()]
        return {"used": self.used, "quarantined": self.quarantined, "bad": bad}

    @classmethod
    def from_dict(
        cls, path: Path | None, state: Mapping[str, Any], *, max_bad: float = 0.01, allowance: int = 10
    ) -> Self:
        """Return a ledger that goes on from ``to_dict``."""
        ledger = cls(path, max_bad=max_bad, allowance=allowance)
        ledger.used, ledger.quarantined = state["used"], state["quarantined"]
        ledger.bad = {(name, index): reason for name, index, reason in state["bad"]}
        return ledger

    def _append(self, row: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=True) + "\n")


def check(name: str, source: Source, path: Path | None = None) -> Ledger:
    """Read every row of a source once, open every picture, and return the counts; nothing is too bad."""
    ledger = Ledger(path, allowance=len(source))
    for index in range(len(source)):
        ledger.take(name, source, index)
    return ledger


def with_open_images(sample: Sample) -> Sample:
    """Return the sample with its pictures decoded, so that later looks at them cost nothing.

    Raises:
        ImageError: if a picture is missing, refused or damaged.

    """
    return replace(sample, turns=tuple(_opened(turn) for turn in sample.turns))


def _opened(turn: Turn) -> Turn:
    parts = (ImageRef(part.open()) if isinstance(part, ImageRef) else part for part in turn.parts)
    return replace(turn, parts=tuple(parts))


def _rows_in(path: Path) -> set[Row]:
    """Return the rows written so far; a last line cut off by a crash is removed, to be written again."""
    if not path.exists():
        return set()
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    rows = (json.loads(line) for line in whole.splitlines())
    return {(row["source"], row["row"]) for row in rows}
