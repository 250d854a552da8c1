"""Published tables of Hugging Face: rows with their pictures as places in the table, nothing decoded."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from vlmix.core.sample import ImageRef
from vlmix.data.tables import Cell, Place, cell, columns_of, pictures_in, rows_in
from vlmix.evals.benchmarks._official import OfficialSettings


class StoredSettings(OfficialSettings):
    """``path`` may hold the table of Hugging Face instead; ``cache`` is where `datasets` keeps its copy."""

    cache: Path | None = None

    def table(self, split: str, files: Sequence[str], folders: Sequence[str] = (".",)) -> Place | None:
        """The first of ``folders`` below ``path`` with parquet files, unless one of ``files`` is there."""
        if any((self.path / name).exists() for name in files):
            return None
        for name in folders:
            folder = self.path / name
            if is_table(folder):
                return Place(str(folder), split=split, cache=str(self.cache) if self.cache else None)
        return None


def is_table(folder: Path) -> bool:
    """Whether parquet files lie in a folder or below it."""
    return folder.is_dir() and next(folder.rglob("*.parquet"), None) is not None


def stored_rows(place: Place, pictures: Collection[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a table by their number from 1; a column of ``pictures`` holds the list of those in it.

    Raises:
        InputError: if the table cannot be opened, or the package for it is missing.

    """
    columns = columns_of(place)
    shown = [name for name in columns if name in pictures]
    others = tuple(name for name in columns if name not in pictures)
    for row in range(rows_in(place)):
        held = cell(place, others, row)
        for name in shown:
            count = len(pictures_in(place, name, row))
            held[name] = [ImageRef(Cell(place, name, row, number)) for number in range(count)]
        yield f"{Path(place.path).name}:{row + 1}", held
