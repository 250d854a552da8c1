"""What trials say about choices: the objective with its interval, and what one choice has over another.

An interval comes from the questions, by the jackknife of ``evals/jackknife.py``: the formula is computed
again without each block of a benchmark's questions, for both choices and every seed, and how far these
replicates scatter says how sure the whole is. Blocks are the same for every choice, so that differences are
paired; those of several benchmarks vary independently, and their squared errors add up. What differs between
seeds beyond the questions is not in the interval; the values of single seeds stand beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlmix.core.errors import InputError
from vlmix.core.interfaces import Benchmark
from vlmix.evals.jackknife import jackknife_error
from vlmix.evals.past_runs import read_run
from vlmix.evals.student import quantile
from vlmix.search.blocks import Blocks, Replicates, figures_by_block
from vlmix.search.ledger import Entry
from vlmix.search.objective import Objective
from vlmix.search.points import Point
from vlmix.search.settings import StopSettings
from vlmix.search.strategies._base import Gain
from vlmix.search.trial import REPORT


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95 % interval, where there is one, and the value of each seed."""

    value: float
    low: float | None
    high: float | None
    seeds: tuple[float, ...]


@dataclass
class Evidence:
    """Findings for strategies: ``trials`` is the folder of all, ``benchmarks`` are by the name formulas use.

    ``keys`` names the trials of a choice, one for each seed; ``entries`` are those that are done.
    """

    objective: Objective
    stop: StopSettings | None
    trials: Path
    benchmarks: Mapping[str, Benchmark]
    keys: dict[Point, tuple[str, ...]] = field(default_factory=dict[Point, tuple[str, ...]])
    entries: Mapping[str, Entry] = field(default_factory=dict[str, Entry])
    _replicates: dict[Point, Replicates] = field(default_factory=dict[Point, Any])

    @property
    def stops(self) -> bool:
        """Whether there is a stop rule."""
        return self.stop is not None

    def entries_of(self, point: Point) -> list[Entry]:
        """The finished trials of a choice, in the order of seeds."""
        return [self.entries[key] for key in self.keys.get(point, ()) if key in self.entries]

    def failed(self, point: Point) -> bool:
        """Whether a trial of it could not be trained, or is not done."""
        found = self.entries_of(point)
        return len(found) < len(self.keys.get(point, ((),))) or any(entry.error for entry in found)

    def value(self, point: Point) -> float:
        """The objective on the means over seeds; minus infinity where a trial failed."""
        if self.failed(point):
            return -math.inf
        return self.objective.value(_means([_known(entry) for entry in self.entries_of(point)]))

    def estimate(self, point: Point) -> Estimate:
        """The objective with its interval."""
        if self.failed(point):
            return Estimate(-math.inf, None, None, ())
        value = self.value(point)
        seeds = tuple(self.objective.value(_known(entry)) for entry in self.entries_of(point))
        low, high = _ends(value, self._told(point))
        return Estimate(value, low, high, seeds)

    def gain(self, point: Point, over: Point) -> Gain:
        """What ``point`` has over ``over``, paired over questions, and the stop rule's verdict."""
        rule = self.stop or StopSettings()
        if self.failed(point) or self.failed(over):
            return Gain(-math.inf if self.failed(point) else math.inf, None, None, False, "a trial failed")
        value = self.value(point) - self.value(over)
        low, high = _ends(value, _paired(self._told(point), self._told(over)))
        told = f"it brings {value:+.4g}"
        told += "" if low is None or high is None else f" [{low:+.4g}, {high:+.4g}]"
        if value <= rule.gain:
            return Gain(value, low, high, False, f"{told}, which is not more than {rule.gain:g}")
        if rule.interval and low is not None and low <= 0:
            return Gain(value, low, high, False, f"{told}, which could be nothing")
        if rule.interval and low is None:
            told += " (no interval: the reports do not tell how sure the formula's figures are)"
        return Gain(value, low, high, True, f"{told}, more than {rule.gain:g}")

    def _told(self, point: Point) -> Replicates:
        if point not in self._replicates:
            self._replicates[point] = self._tell(point)
        return self._replicates[point]

    def _tell(self, point: Point) -> Replicates:
        """The objective without each block of each benchmark; nothing where that cannot be told."""
        asked = sorted({name.partition(".")[0] for name in self.objective.names} - {"cost"})
        runs = [(_known(entry), self._blocks(entry, asked)) for entry in self.entries_of(point)]
        found: Replicates = {}
        for name in asked:
            parts = [(known, blocks[name]) for known, blocks in runs if name in blocks]
            dealings = {blocks.dealing for _, blocks in parts}
            if len(parts) < len(runs) or len(dealings) != 1:
                return {}
            columns = zip(*(blocks.figures for _, blocks in parts), strict=True)
            try:
                values = [
                    self.objective.value(
                        _means([{**known, **left} for (known, _), left in zip(parts, column, strict=True)])
                    )
                    for column in columns
                ]
            except InputError:  # a figure that is not defined without some block
                return {}
            found[name] = (dealings.pop(), np.array(values))
        return found

    def _blocks(self, entry: Entry, asked: Sequence[str]) -> dict[str, Blocks]:
        """Each benchmark's figures without each block of its questions, where the report tells them."""
        try:
            results = list(read_run(self.trials / entry.key / REPORT).results.values())
        except InputError:
            return {}
        found: dict[str, Blocks] = {}
        for place, (name, benchmark) in enumerate(self.benchmarks.items()):
            wanted = {each: entry.figures.get(each, math.nan) for each in self.objective.names}
            wanted = {each: value for each, value in wanted.items() if each.startswith(f"{name}.")}
            if name in asked and place < len(results):
                blocks = figures_by_block(name, benchmark, results[place], wanted)
                found |= {} if blocks is None else {name: blocks}
        return found


def _known(entry: Entry) -> dict[str, float]:
    return {**entry.figures, **{f"cost.{name}": value for name, value in entry.cost.items()}}


def _means(known: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every name that all of them have."""
    names = set.intersection(*(set(each) for each in known))
    return {name: math.fsum(each[name] for each in known) / len(known) for name in names}


def _paired(mine: Replicates, theirs: Replicates) -> Replicates:
    """The differences, block by block; nothing where the two were not dealt alike."""
    if any(theirs.get(name, ("", None))[0] != dealing for name, (dealing, _) in mine.items()):
        return {}
    return {name: (dealing, values - theirs[name][1]) for name, (dealing, values) in mine.items()}


def _ends(value: float, replicates: Replicates) -> tuple[float | None, float | None]:
    """Student's t times the standard error on both sides, with the fewest degrees of freedom of any part."""
    if not replicates:
        return None, None
    errors = [jackknife_error(values) for _, values in replicates.values()]
    error = math.hypot(*(error for error, _ in errors))
    distance = quantile(0.95, min(degrees for _, degrees in errors)) * error
    return value - distance, value + distance
