"""How answers made anywhere are scored by rule: rows in, judgements out. No model, no data set, no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from vlmix.core.sample import Judged, Row

Summary = Mapping[str, "float | Summary"]
"""A protocol's aggregates as its own script reports them, in groups where it has groups."""


@dataclass(frozen=True, slots=True)
class Protocol:
    """One rule of scoring: whose it is, as repository@commit and file, and what 1 would be in its unit."""

    source: str
    full: float = 1.0


class Scorer(ABC):
    """The rules by which one benchmark's answers are scored; the first of ``protocols`` is the official one.

    ``fields`` are those a question must have, with what they hold; ``optional`` ones may be missing.
    ``units`` names the figures of ``summarise`` that are no share of 1, by their path with dots.
    """

    protocols: ClassVar[Mapping[str, Protocol]]
    fields: ClassVar[Mapping[str, str]] = {}
    optional: ClassVar[Mapping[str, str]] = {}
    units: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def official(cls) -> str:
        """The name of the official protocol."""
        return next(iter(cls.protocols))

    @abstractmethod
    def judge(self, rows: Sequence[Row], protocol: str) -> list[Judged]:
        """One judgement for each row, in order; rows may depend on one another (rotations, guesses)."""

    @abstractmethod
    def summarise(self, rows: Sequence[Row], judged: Sequence[Judged], protocol: str) -> Summary:
        """The aggregates, as the protocol's own script computes them from these rows."""

    def failed(self, row: Row, judged: Judged, protocol: str) -> Judged:
        """What the judgement of a question that could not be asked becomes: wrong, and counted as such.

        An official script never sees such a question; its ``judged`` is that of no answer.
        """
        del row, protocol
        return replace(judged, value=0.0, state="failed", detail=dict.fromkeys(judged.detail, 0.0))


def flat(summary: Summary, above: str = "") -> Iterator[tuple[str, float]]:
    """Every figure of nested groups, by its path with dots."""
    for name, value in summary.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def unit_of(figure: str, units: Mapping[str, str]) -> str:
    """The unit of a figure, or of the nearest group around it that has one; empty for a share of 1."""
    while figure not in units and "." in figure:
        figure = figure.rpartition(".")[0]
    return units.get(figure, "")
