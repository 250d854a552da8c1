"""The most frequent of many paths in bounded memory: exact while all fit, with a stated bound beyond."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

CAPACITY = 4096


class PathCounter:
    """Counts paths; where more than ``capacity`` differ, all counts are lowered until that many are left.

    The true count of a path lies between ``counts[path]`` (0 if it is absent) and that plus ``lost``, and
    ``lost`` is at most ``total / capacity``. Papers: Misra and Gries, 1982; Agarwal et al., Mergeable
    Summaries, 2012.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.capacity, self.counts = capacity, dict[str, int]()
        self.total = self.lost = 0

    @property
    def exact(self) -> bool:
        """Whether every count is the true one."""
        return self.lost == 0

    def add(self, found: Mapping[str, int]) -> None:
        """Count each path as often as ``found`` says."""
        for path, count in found.items():
            self.counts[path] = self.counts.get(path, 0) + count
            self.total += count
        if len(self.counts) > self.capacity:
            level = sorted(self.counts.values(), reverse=True)[self.capacity]
            self.lost += level
            self.counts = {path: count - level for path, count in self.counts.items() if count > level}

    def merge(self, other: PathCounter) -> None:
        """Add what another one counted; the bounds add up."""
        missing = other.total - sum(other.counts.values())
        self.add(other.counts)
        self.total, self.lost = self.total + missing, self.lost + other.lost

    def top(self, most: int) -> list[tuple[str, int]]:
        """The most frequent paths with their counts; ties by name."""
        return sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))[:most]

    def to_json(self) -> dict[str, Any]:
        """What ``from_json`` reads."""
        counts = dict(self.top(len(self.counts)))
        return {"capacity": self.capacity, "total": self.total, "lost": self.lost, "counts": counts}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """The counter that ``to_json`` wrote."""
        made = cls(raw["capacity"])
        made.total, made.lost, made.counts = raw["total"], raw["lost"], dict(raw["counts"])
        return made
