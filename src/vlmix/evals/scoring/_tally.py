"""What most rules need: the texts of a gold answer, means, and the judgement where there is no answer."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Final, TypeVar

from vlmix.core.sample import Json, Judged

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

UNANSWERED: Final = Judged(None, state="missing")
"""No answer, and no value for it."""


def texts(gold: Json) -> list[str]:
    """Every accepted answer as text; one that stands alone is a list of one."""
    return [str(each) for each in (gold if isinstance(gold, list) else [gold])]


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean; 0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def percent(values: Sequence[float]) -> float:
    """The mean of shares of 1 in percent, with the two decimals that most scripts print."""
    return round(100 * mean(values), 2)


def grouped(pairs: Iterable[tuple[K, V]]) -> dict[K, list[V]]:
    """Values by key, keys in order of appearance."""
    groups: dict[K, list[V]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups
