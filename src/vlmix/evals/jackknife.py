"""How sure any figure of a benchmark is, whatever its formula and its unit: the delete-a-group jackknife.

The groups are dealt into at most 100 blocks, and the figure is computed again without each block. From the
replicates t_1 … t_K comes the variance (K-1)/K Σ (t_k - mean)² (Wolter 2007, Introduction to Variance
Estimation, chapter 4; Shao and Tu 1995, The Jackknife and Bootstrap, chapter 2). Nothing is drawn twice,
so rows that are joined by their fields (rotations of one question, pairs on one picture) stay as they are;
sums, means and ratios over the whole set, such as BLEU, all come out in their own unit.

The ends are Student's t times the standard error. A share of 1 gets Wilson's ends instead, for as many
independent answers as have that standard error (the effective sample size of surveys: Korn and Graubard
1998, Survey Methodology 24:193-201), which stay in 0..1. The standard error itself is known to
1/√(2(K-1)): 7 % with 100 blocks, 11 % with 40. Decision 23 has the coverage of this and of what else was
tried.

A figure that is the mean of scores, over all or over whole tasks, gets that mean's interval.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Final

import numpy as np
from numpy.typing import NDArray

from vlmix.core.errors import InputError
from vlmix.core.sample import Score
from vlmix.evals.statistics import Interval, grouped, mean_interval, wilson_ends, wilson_over_groups
from vlmix.evals.student import quantile

Summarise = Callable[[Sequence[Score]], Mapping[str, float]]
UNDETERMINED = "undetermined"
"""The method of an interval whose ends are the value only because nothing could be found out about them."""

_BLOCKS, _FEWER_BLOCKS, _MANY_SCORES = 100, 40, 5000
_ASKED_ALONE = 200  # groups asked one by one whether a figure depends on them
_SCALES = (1.0, 100.0)
_SHARES: Final[Mapping[str, str]] = {}
_UNDEFINED = (InputError, ArithmeticError, LookupError, ValueError)  # what formulas raise on too few scores


@dataclass(frozen=True, slots=True)
class FigureIntervals:
    """The interval of each figure; of those that are no means of values also the replicates, block by block.

    ``blocks`` names how the groups were dealt: the replicates of two runs belong together where it is the
    same, and their differences then tell how sure a difference of the figures is.
    """

    intervals: Mapping[str, Interval]
    replicates: Mapping[str, tuple[float, ...]] = field(default_factory=dict[str, tuple[float, ...]])
    blocks: str = ""


def figure_intervals(
    summarise: Summarise,
    scores: Sequence[Score],
    *,
    seed: int = 0,
    units: Mapping[str, str] = _SHARES,
    only: Collection[str] | None = None,
) -> FigureIntervals:
    """The interval of every figure that ``summarise`` makes of the scores, or of ``only`` some.

    ``units`` has those that are no share of 1; percent are shares all the same. Results do not depend on the
    order of the scores.

    Raises:
        InputError: if there is no score, or a wanted figure is undefined on all of them.

    """
    if not scores:
        raise InputError("an interval needs at least one score that the figure is defined on, got none")
    full = dict(summarise(scores))
    names = list(full if only is None else only)
    if missing := [name for name in names if name not in full]:
        raise InputError(f"{', '.join(missing)}: undefined on these scores")
    moving, found = _means_by_value(summarise, scores, names, seed)
    left = [name for name in names if name not in found]
    if not left:
        return FigureIntervals({name: found[name] for name in names})
    dealt = Dealt.deal(scores, seed)
    told = [_told(summarise, dealt.without(block)) for block in range(dealt.count)]
    replicates = {name: [each.get(name, math.nan) for each in told] for name in left}
    for name in left:
        drawn = np.array(replicates[name])
        # A rule may read something else than values and make their mean of it; one that moved has been asked.
        mean = None if name in moving else _mean_by_task(full[name], drawn, dealt, seed)
        found[name] = mean or _by_jackknife(full[name], drawn, dealt, whole_of(units.get(name, "")))
    stuck = {name: whole_of(units.get(name, "")) for name in left if found[name].method == UNDETERMINED}
    found |= _by_groups_alone(summarise, full, {name: top for name, top in stuck.items() if top}, dealt)
    whole = {name: tuple(values) for name, values in replicates.items() if all(map(math.isfinite, values))}
    return FigureIntervals({name: found[name] for name in names}, whole, dealt.name)


def whole_of(unit: str) -> float | None:
    """What a figure in this unit is a share of: 1, 100 percent, or nothing."""
    return {"": 1.0, "%": 100.0}.get(unit)


def jackknife_error(replicates: NDArray[np.float64]) -> tuple[float, int]:
    """The standard error that replicates tell, and its degrees of freedom.

    Blocks without any group that the figure depends on leave it as it is: they are no freedom.
    """
    count = len(replicates)
    error = math.sqrt((count - 1) / count * float(((replicates - replicates.mean()) ** 2).sum()))
    usual = float(np.median(replicates))
    moved = int((np.abs(replicates - usual) > 1e-12 * max(1.0, abs(usual))).sum())
    return error, max(1, min(moved, count) - 1)


@dataclass(frozen=True, slots=True)
class Dealt:
    """The groups, dealt into ``count`` blocks; ``name`` tells the same groups in the same blocks."""

    clusters: Sequence[Sequence[Score]]
    block_of: Sequence[int]
    count: int
    name: str

    @classmethod
    def deal(cls, scores: Sequence[Score], seed: int) -> Dealt:
        """Deal them out, in whatever order the scores come."""
        clusters = grouped(scores)
        most = _BLOCKS if len(scores) <= _MANY_SCORES else _FEWER_BLOCKS
        count = min(len(clusters), most)
        order = np.random.default_rng(seed).permutation(len(clusters))
        block_of = [int(place) % count for place in order]
        ids = "\n".join(score.sample_id for cluster in clusters for score in cluster)
        digest = hashlib.sha256(f"{seed} {count}\n{ids}".encode()).hexdigest()[:16]
        return cls(clusters, block_of, count, digest)

    @property
    def scores(self) -> int:
        """How many scores the groups hold."""
        return sum(map(len, self.clusters))

    def without(self, block: int) -> list[Score]:
        """The scores of all other blocks."""
        kept = (c for c, own in zip(self.clusters, self.block_of, strict=True) if own != block)
        return list(chain.from_iterable(kept))


def _told(summarise: Summarise, scores: Sequence[Score]) -> Mapping[str, float]:
    """The figures that are defined on these scores."""
    if not scores:
        return {}
    try:
        found = summarise(scores)
    except _UNDEFINED:
        return {}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _means_by_value(
    summarise: Summarise, scores: Sequence[Score], names: Sequence[str], seed: int
) -> tuple[list[str], dict[str, Interval]]:
    """The figures that read the scores' values, and of those the means over whole tasks with their intervals.

    Found by asking for the figures of random values: the tasks whose values move one, then whether it is
    their mean. Figures that read something else than the values do not move.
    """
    random = np.random.default_rng(0)

    def noise(some: Sequence[Score]) -> list[Score]:
        values = random.random(len(some))
        return [replace(score, value=float(value)) for score, value in zip(some, values, strict=True)]

    ordered = [score for cluster in grouped(scores) for score in cluster]
    noisy = noise(ordered)
    full, base = _told(summarise, ordered), _told(summarise, noisy)
    moving = [name for name in names if base.get(name) != full.get(name)]
    if not moving:
        return [], {}
    members: dict[str, list[int]] = {name: [] for name in moving}
    for task in sorted({score.task for score in ordered}):
        own = [index for index, score in enumerate(ordered) if score.task == task]
        moved = list(noisy)
        for index, score in zip(own, noise([ordered[index] for index in own]), strict=True):
            moved[index] = score
        told = _told(summarise, moved)
        for name in moving:
            if told.get(name) != base.get(name):
                members[name] += own
    found: dict[str, Interval] = {}
    for name, some in members.items():
        mean = math.fsum(noisy[index].value for index in some) / max(len(some), 1)
        for scale in _SCALES:
            if some and name in base and math.isclose(base[name], scale * mean, abs_tol=1e-9):
                found[name] = _scaled(mean_interval([ordered[index] for index in some], seed=seed), scale)
    return moving, found


def _mean_by_task(value: float, drawn: NDArray[np.float64], dealt: Dealt, seed: int) -> Interval | None:
    """The interval of a figure that follows the mean of counted scores, all or one task's, in every block."""
    if not np.isfinite(drawn).all() or np.ptp(drawn) == 0:
        return None
    pairs = [
        (score, block)
        for cluster, block in zip(dealt.clusters, dealt.block_of, strict=True)
        for score in cluster
        if score.counted
    ]
    for task in (None, *sorted({score.task for score, _ in pairs})):
        some = [(score, block) for score, block in pairs if task is None or score.task == task]
        values = np.array([score.value for score, _ in some])
        blocks = np.array([block for _, block in some])
        rest = len(some) - np.bincount(blocks, minlength=dealt.count)
        total = values.sum()
        if total == 0 or not rest.all():
            continue
        means = (total - np.bincount(blocks, weights=values, minlength=dealt.count)) / rest
        scale = value / (total / len(some))
        if np.allclose(drawn, scale * means, rtol=1e-9, atol=1e-12):
            return _scaled(mean_interval([score for score, _ in some], seed=seed), float(scale))
    return None


def _scaled(interval: Interval, scale: float) -> Interval:
    if scale == 1:
        return interval
    value, low, high = (scale * end for end in (interval.value, interval.low, interval.high))
    return replace(interval, value=value, low=low, high=high)


def _by_jackknife(value: float, drawn: NDArray[np.float64], dealt: Dealt, whole: float | None) -> Interval:
    n, groups = dealt.scores, len(dealt.clusters)
    none = Interval(value, value, value, n, groups, UNDETERMINED)
    if len(drawn) < 2 or not np.isfinite(drawn).all():
        return none
    error, degrees = jackknife_error(drawn)
    if error <= 1e-12 * max(1.0, abs(value)) or (whole and value in {0.0, whole}):
        return none
    distance = quantile(0.95, degrees)
    if whole is None or not 0 < value < whole:
        return replace(none, low=value - distance * error, high=value + distance * error, method="jackknife")
    low, high = wilson_ends(value / whole, value * (whole - value) / error**2, distance)
    return replace(none, low=whole * low, high=whole * high, method="jackknife, wilson")


def _by_groups_alone(
    summarise: Summarise, values: Mapping[str, float], wholes: Mapping[str, float], dealt: Dealt
) -> dict[str, Interval]:
    """Wilson's interval for shares that nothing moves, over the groups on which each is defined at all."""
    if not wholes:
        return {}
    order = np.random.default_rng(0).permutation(len(dealt.clusters))[:_ASKED_ALONE]
    told = [_told(summarise, dealt.clusters[int(index)]) for index in order]
    found: dict[str, Interval] = {}
    for name, whole in wholes.items():
        value = values[name]
        if not 0 <= value <= whole:
            continue
        # A formula may give 0 where it has nothing to say.
        depends = sum(name in each and (value == 0 or each[name] != 0) for each in told)
        groups = max(1, round(depends / len(told) * len(dealt.clusters)))
        found[name] = replace(_scaled(wilson_over_groups(value / whole, groups), whole), n=dealt.scores)
    return found
