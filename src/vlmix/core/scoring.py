"""How answers made anywhere are scored by rule: rows in, judgements out. No model, no data set, no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from vlmix.core.sample import Json, State

Summary = Mapping[str, "float | Summary"]
"""A protocol's aggregates as its own script reports them, in groups where it has groups."""


@dataclass(frozen=True, slots=True)
class Row:
    """One question with the answer given to it; ``answer`` is None where there is none.

    ``fields`` are those of the question that the scorer names; ``gold`` is a text, or all accepted ones.
    """

    id: str
    gold: Json
    answer: str | None
    fields: Mapping[str, Json] = field(default_factory=dict[str, Json])


@dataclass(frozen=True, slots=True)
class Judged:
    """What a protocol makes of one row.

    ``value`` is in the protocol's own unit, None where it gives none (a row that it skips, a division by
    zero). ``parsed`` is how it understood the answer. ``state`` tells an answer that was read from one that
    the rule could not read, one for which it then guessed, one that is not there, and one whose judge
    failed. ``detail`` holds further numbers of the row, such as BLEU beside CIDEr.
    """

    value: float | None
    parsed: str = ""
    state: State = "read"
    detail: Mapping[str, float] = field(default_factory=dict[str, float])


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
