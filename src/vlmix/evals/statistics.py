"""How sure a mean of scores is: its 95 % interval, and that of the difference of two on the same questions.

Independent scores of 0 and 1 get Wilson's interval (Wilson 1927, JASA 22:209-212): with n scores of mean
p and z = 1.96, its ends are (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n). It never leaves 0..1 and
keeps a width at 0 % and 100 %.

Scores that share a group (one sentence over several pictures) are not independent. Whole groups are drawn
with replacement and the mean is computed again each time; the interval runs from the 2.5th to the
97.5th percentile (cluster bootstrap: Davison and Hinkley 1997, section 3.8; Field and Welsh 2007, JRSS B
69:369-390). Of more than 4000 groups none is drawn: the ratio's own standard error gives the same. Where
every group agrees no drawing can vary, and Wilson's interval over the number of groups stands in, so that a
perfect score on few groups does not look certain.

Two systems on the same independent questions get Newcombe's paired interval from Wilson's ends (Newcombe
1998, Statistics in Medicine 17:2635-2650, method 10); with groups, the bootstrap of the differences. Figures
that are no mean of scores have their intervals in ``jackknife.py``.
Results depend on the scores only, not on their order: groups are sorted before anything is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vlmix.core.errors import InputError
from vlmix.core.sample import Score

Z95 = 1.959963984540054
_CHUNK_CELLS = 2_000_000  # drawn counts held at once: 16 MB
_DRAWN_GROUPS = 4000  # of more groups a mean is as good as normal, and drawing takes seconds


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95 % interval: over how many scores, how many independent groups, and how."""

    value: float
    low: float
    high: float
    n: int
    groups: int
    method: str


def wilson(value: float, n: int) -> Interval:
    """Wilson's interval for ``n`` independent scores of 0 or 1 with mean ``value``.

    Raises:
        InputError: if there is no score or the mean lies outside 0..1.

    """
    if n < 1 or not 0.0 <= value <= 1.0:
        raise InputError(f"an interval needs at least one score and a mean in 0..1, got {n} and {value}")
    return Interval(value, *wilson_ends(value, n), n, n, "wilson")


def wilson_ends(value: float, size: float, quantile: float = Z95) -> tuple[float, float]:
    """The ends of Wilson's interval for ``size`` independent scores, which need be no whole number."""
    square = quantile * quantile / size
    middle = (value + square / 2) / (1 + square)
    half = quantile * math.sqrt(value * (1 - value) / size + square / (4 * size)) / (1 + square)
    return max(0.0, min(value, middle - half)), min(1.0, max(value, middle + half))


def mean_interval(scores: Sequence[Score], *, resamples: int = 2000, seed: int = 0) -> Interval:
    """The mean of all scores with its interval: Wilson's if they are independent 0/1, else over groups.

    Raises:
        InputError: if there is no score.

    """
    if not scores:
        raise InputError("an interval needs at least one score, got none")
    clusters = grouped(scores)
    if len(clusters) == len(scores) and all(score.value in {0.0, 1.0} for score in scores):
        return wilson(sum(score.value for score in scores) / len(scores), len(scores))
    sums = np.array([math.fsum(score.value for score in cluster) for cluster in clusters])
    counts = np.array([len(cluster) for cluster in clusters])
    return _ratio_interval(sums, counts, resamples, seed)


def paired_difference(
    a: Sequence[Score], b: Sequence[Score], *, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Mean of ``a`` minus mean of ``b`` over the sample ids both have, with its interval in -1..1.

    Raises:
        InputError: if no id is common, or an id stands in different groups.

    """
    pairs = _pairs(a, b)
    clusters = grouped([mine for mine, _ in pairs.values()])
    first = np.array([math.fsum(s.value for s in cluster) for cluster in clusters])
    second = np.array([math.fsum(pairs[s.sample_id][1].value for s in cluster) for cluster in clusters])
    counts = np.array([len(cluster) for cluster in clusters])
    binary = all(score.value in {0.0, 1.0} for pair in pairs.values() for score in pair)
    if binary and len(clusters) == len(pairs):
        return _newcombe(first, second)
    rates = (first - second) / counts
    if np.ptp(rates) > 0:
        return _spread(first - second, counts, resamples, seed)
    whole = _newcombe(first / counts, second / counts)
    return replace(whole, n=int(counts.sum()), method="newcombe over groups")


def grouped(scores: Iterable[Score]) -> list[list[Score]]:
    """The scores by group, in an order that depends on nothing else; without a group each stands alone."""
    found: dict[tuple[bool, str], list[Score]] = {}
    for score in scores:
        found.setdefault((bool(score.group), score.group or score.sample_id), []).append(score)
    return [sorted(found[key], key=lambda score: score.sample_id) for key in sorted(found)]


def _pairs(a: Sequence[Score], b: Sequence[Score]) -> Mapping[str, tuple[Score, Score]]:
    other = {score.sample_id: score for score in b}
    pairs = {score.sample_id: (score, other[score.sample_id]) for score in a if score.sample_id in other}
    if not pairs:
        raise InputError("the two runs have no sample id in common: they were judged on different questions")
    for sample_id, (mine, theirs) in pairs.items():
        if mine.group != theirs.group:
            raise InputError(
                f"sample {sample_id!r} is in group {mine.group!r} of one run and {theirs.group!r} of the "
                "other: judge both runs with the same benchmark settings"
            )
    return pairs


def _ratio_interval(
    sums: NDArray[np.float64], counts: NDArray[np.int64], resamples: int, seed: int
) -> Interval:
    n, value = int(counts.sum()), float(sums.sum() / counts.sum())
    if np.ptp(sums / counts) == 0:
        return replace(wilson_over_groups(value, len(sums)), n=n)
    found = _spread(sums, counts, resamples, seed)
    return replace(found, low=max(0.0, found.low), high=min(1.0, found.high))


def _spread(sums: NDArray[np.float64], counts: NDArray[np.int64], resamples: int, seed: int) -> Interval:
    """The ratio of the sums with its interval, drawn or, of many groups, by its linear standard error."""
    n, groups, value = int(counts.sum()), len(sums), float(sums.sum() / counts.sum())
    if groups <= _DRAWN_GROUPS:
        low, high = np.quantile(_drawn_ratios(sums, counts, resamples, seed), [0.025, 0.975])
        return Interval(
            value, min(value, float(low)), max(value, float(high)), n, groups, "cluster bootstrap"
        )
    squares = float(((sums - value * counts) ** 2).sum()) * groups / (groups - 1)
    half = Z95 * math.sqrt(squares) / n
    return Interval(value, value - half, value + half, n, groups, "linear standard error")


def _drawn_ratios(
    sums: NDArray[np.float64], counts: NDArray[np.int64], resamples: int, seed: int
) -> NDArray[np.float64]:
    """Sum over count of each drawing of whole groups; a drawing is a row of how often each group came."""
    random, parts, left = np.random.default_rng(seed), [], resamples
    while left:
        rows = min(left, max(1, _CHUNK_CELLS // len(sums)))
        times = random.multinomial(len(sums), _even(len(sums)), size=rows)
        parts.append((times * sums).sum(axis=1) / (times * counts).sum(axis=1))
        left -= rows
    return np.concatenate(parts)


def _even(groups: int) -> NDArray[np.float64]:
    return np.full(groups, 1.0 / groups)


def wilson_over_groups(value: float, groups: int) -> Interval:
    """Wilson's interval where nothing varies between so many groups."""
    return replace(wilson(min(1.0, max(0.0, value)), groups), method="wilson over groups")


def _newcombe(a: NDArray[np.float64], b: NDArray[np.float64]) -> Interval:
    """Newcombe's method 10 on paired values of 0 and 1: Wilson's ends joined through the correlation φ."""
    n, p, q = len(a), float(a.mean()), float(b.mean())
    first, second = wilson(p, n), wilson(q, n)
    both, neither = float((a * b).sum()), float(((1 - a) * (1 - b)).sum())
    only_a, only_b = float((a * (1 - b)).sum()), float(((1 - a) * b).sum())
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    excess = both * neither - only_a * only_b
    excess = max(excess - n / 2, 0.0) if excess > 0 else excess
    phi = excess / math.sqrt(margins) if margins > 0 else 0.0
    low = _joined(p - first.low, second.high - q, phi)
    high = _joined(first.high - p, q - second.low, phi)
    return Interval(p - q, max(-1.0, p - q - low), min(1.0, p - q + high), n, n, "newcombe")


def _joined(x: float, y: float, phi: float) -> float:
    return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))
