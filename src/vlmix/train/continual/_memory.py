"""Rows of earlier tasks, chosen once and read from their own sources."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from vlmix.core.interfaces import Source
from vlmix.core.sample import Sample
from vlmix.core.settings import PartSettings


class Chosen(Source):
    """Some rows of some sources, as (number of the source, row) pairs."""

    settings_class = PartSettings

    def __init__(self, sources: Sequence[Source], rows: Sequence[tuple[int, int]]) -> None:
        super().__init__(None)
        self.sources, self.rows = tuple(sources), tuple(rows)

    def __len__(self) -> int:
        """How many were chosen."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        """The chosen row.

        Raises:
            SampleError: if it cannot be used.

        """
        source, row = self.rows[index]
        return self.sources[source][row]

    def line(self, index: int) -> int:
        """Where it stands in its own file."""
        source, row = self.rows[index]
        return self.sources[source].line(row)

    @classmethod
    def tiny(cls, folder: Any) -> Any:
        """There is none: it is made of other sources."""
        raise TypeError("Chosen is made of other sources")


class Counted(Source):
    """So many rows that nobody reads: what a plan knows of a set."""

    settings_class = PartSettings

    def __init__(self, size: int) -> None:
        super().__init__(None)
        self.size = size

    def __len__(self) -> int:
        """How many there are."""
        return self.size

    def __getitem__(self, index: int) -> Sample:
        """There is none to read."""
        raise TypeError(f"row {index} of {self.size} is counted, not read")

    @classmethod
    def tiny(cls, folder: Any) -> Any:
        """There is none: it is a number."""
        raise TypeError("Counted is a number of rows")


def random_rows(sizes: Sequence[int], share: float, key: tuple[int, ...]) -> list[tuple[int, int]]:
    """``share`` of all rows of sources of these sizes, at least one, drawn without repetition."""
    total = sum(sizes)
    count = min(total, max(1, round(share * total)))
    # Sorting raw output: numpy keeps that stable across versions, which it does not promise for permutations.
    order = np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(total), kind="stable")
    ends = np.cumsum(sizes)
    drawn = np.sort(order[:count])
    sources = np.searchsorted(ends, drawn, side="right")
    starts = ends - np.asarray(sizes)
    return [(int(source), int(row - starts[source])) for source, row in zip(sources, drawn, strict=True)]


def reservoir(
    stream: Iterable[tuple[int, int, int]], size: int, key: tuple[int, ...]
) -> list[tuple[int, int, int]]:
    """A sample of ``size`` rows of a stream in which every row seen so far is equally likely to be.

    Paper: Vitter, 1985, algorithm R.
    """
    held: list[tuple[int, int, int]] = []
    draws = np.random.PCG64(np.random.SeedSequence(key))
    for seen, row in enumerate(stream):
        if len(held) < size:
            held.append(row)
        elif (place := int(draws.random_raw()) % (seen + 1)) < size:
            held[place] = row
    return held
