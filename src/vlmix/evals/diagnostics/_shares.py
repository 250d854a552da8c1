"""How sure a share of accuracy is: conditional utilisation with intervals that pair question by question.

u = (a - b) / a, where a is the mean score with all encoders and b that without one, over the same questions.
Groups of questions are drawn whole, with replacement, and both means are taken from each drawing (cluster
bootstrap of a ratio: Davison and Hinkley 1997, 3.8).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vlmix.core.sample import Score
from vlmix.evals.statistics import Interval, paired_difference

_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Utilisation:
    """One u for each encoder, and the gap between the largest and the smallest.

    All are ``None`` where nothing is right with all encoders: a share of nothing does not exist.
    """

    rates: Sequence[Interval | None]
    gap: Interval | None


def utilisation(whole: Sequence[Score], without: Sequence[Sequence[Score]], seed: int) -> Utilisation:
    """u of every encoder from scores with all encoders and from those without each; in any order."""
    sums_GE, groups = _sums(whole, without)
    totals_E = sums_GE.sum(0)
    if totals_E[0] <= 0:
        return Utilisation([None] * len(without), None)
    draws_RG = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1.0 / groups), size=_RESAMPLES)
    drawn_RE = draws_RG @ sums_GE
    drawn_RE = drawn_RE[drawn_RE[:, 0] > 0]
    rates_RE = 1 - drawn_RE[:, 1:] / drawn_RE[:, :1]
    values_E = 1 - totals_E[1:] / totals_E[0]
    accuracy = float(totals_E[0]) / len(whole)
    rates = [
        _interval(float(value), drawn, len(whole), groups)
        if np.ptp(drawn) > 0
        else _unvaried(whole, one, accuracy, seed)
        for value, drawn, one in zip(values_E, rates_RE.T, without, strict=True)
    ]
    gap = _interval(float(np.ptp(values_E)), np.ptp(rates_RE, axis=1), len(whole), groups)
    if gap.low == gap.high:
        widest = max(rate.high for rate in rates) - min(rate.low for rate in rates)
        gap = replace(gap, high=widest, method="between the rates' ends")
    return Utilisation(rates, gap)


def _unvaried(whole: Sequence[Score], one: Sequence[Score], accuracy: float, seed: int) -> Interval:
    """Where no drawing varies the difference's own interval stands in: a few questions prove nothing."""
    found = paired_difference(whole, one, seed=seed)
    ends = (found.value / accuracy, found.low / accuracy, min(1.0, found.high / accuracy))
    return Interval(*ends, n=found.n, groups=found.groups, method=found.method)


def _sums(whole: Sequence[Score], without: Sequence[Sequence[Score]]) -> tuple[NDArray[np.float64], int]:
    """Sums of scores of every group (rows), with all encoders first, then without each."""
    tables = [{score.sample_id: score.value for score in scores} for scores in (whole, *without)]
    clusters: dict[tuple[bool, str], list[str]] = {}
    for score in sorted(whole, key=lambda score: score.sample_id):
        clusters.setdefault((bool(score.group), score.group or score.sample_id), []).append(score.sample_id)
    rows = [
        [math.fsum(table[name] for name in clusters[key]) for table in tables] for key in sorted(clusters)
    ]
    return np.array(rows), len(rows)


def _interval(value: float, drawn: NDArray[np.float64], n: int, groups: int) -> Interval:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(value, min(value, float(low)), max(value, float(high)), n, groups, "cluster bootstrap")
