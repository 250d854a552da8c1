"""Are two systems different on the same questions? Exact tests, and Holm's correction for many of them.

Scores of 0 and 1 of independent questions get McNemar's exact test (McNemar 1947, Psychometrika 12:153-157):
of the questions that only one of the two answered rightly, is it a coin's work which one it was? All others,
graded or grouped, get the test that the coin stands for: the sign of each group's difference is turned at
random (Fisher 1935, The Design of Experiments, section 21), all ways where there are few, drawn ways where
there are more, and by the normal limit where there are so many that drawing would be less exact.
Holm (1979, Scandinavian Journal of Statistics 6:65-70) keeps the chance of any false finding among several
below the level that one alone has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from vlmix.core.errors import InputError
from vlmix.core.sample import Score
from vlmix.evals.statistics import Interval, grouped, paired_difference

_ALL_WAYS = 12  # groups that differ, of which every combination of signs is looked at
_DRAWS = 20_000
_NORMAL = 2000  # groups that differ, from which the normal limit is taken


@dataclass(frozen=True, slots=True)
class Difference:
    """The first system's mean minus the second's on common questions, and how the questions fell.

    ``p`` is the chance of as large a difference between equal systems, either way, by ``test``; ``adjusted``
    is what Holm's correction makes of it.
    """

    interval: Interval
    wins: int
    losses: int
    ties: int
    p: float
    test: str
    adjusted: float = 1.0


def difference(a: Sequence[Score], b: Sequence[Score], seed: int = 0) -> Difference:
    """Compare two systems over the sample ids both have.

    Raises:
        InputError: if no id is common, or an id stands in different groups.

    """
    interval = paired_difference(a, b, seed=seed)
    other = {score.sample_id: score for score in b}
    mine = [score for score in a if score.sample_id in other]
    gaps = {score.sample_id: score.value - other[score.sample_id].value for score in mine}
    wins, losses = (sum(sign * gap > 0 for gap in gaps.values()) for sign in (1, -1))
    binary = all(s.value in {0.0, 1.0} for s in mine) and all(
        other[s.sample_id].value in {0.0, 1.0} for s in mine
    )
    clusters = grouped(mine)
    if binary and len(clusters) == len(mine):
        p, test = mcnemar(wins, losses), "McNemar's exact test"
    else:
        sums = [math.fsum(gaps[score.sample_id] for score in cluster) for cluster in clusters]
        p, test = sign_flip(sums, seed)
    return Difference(interval, wins, losses, len(mine) - wins - losses, p, test)


def mcnemar(first_only: int, second_only: int) -> float:
    """The two-sided exact p of so many questions that only the first, and only the second, got right.

    Raises:
        InputError: if a count is negative.

    """
    if min(first_only, second_only) < 0:
        raise InputError(f"counts cannot be negative, got {first_only} and {second_only}")
    n, fewer = first_only + second_only, min(first_only, second_only)
    logs = [
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2)
        for k in range(fewer + 1)
    ]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def sign_flip(gaps: Sequence[float], seed: int = 0) -> tuple[float, str]:
    """The two-sided p of the sum of these differences if each sign were a coin's, and how it was found."""
    moving = np.array([gap for gap in gaps if abs(gap) > 1e-12])
    if not len(moving):
        return 1.0, "nothing differs"
    total, spread = abs(float(moving.sum())), math.sqrt(float((moving**2).sum()))
    least = total - 1e-9 * spread
    if len(moving) <= _ALL_WAYS:
        signs = np.array(list(product((-1.0, 1.0), repeat=len(moving))))
        return float((np.abs(signs @ moving) >= least).mean()), "exact sign-flip test"
    if len(moving) >= _NORMAL:
        return math.erfc(total / spread / math.sqrt(2)), "sign-flip test, normal limit"
    random, hits, left = np.random.default_rng(seed), 0, _DRAWS
    while left:
        rows = min(left, max(1, 2_000_000 // len(moving)))
        signs = random.integers(0, 2, (rows, len(moving)), dtype=np.int8)
        hits += int((np.abs((2.0 * signs - 1.0) @ moving) >= least).sum())
        left -= rows
    return (1 + hits) / (1 + _DRAWS), f"sign-flip test, {_DRAWS} draws"


def holm(chances: Sequence[float]) -> list[float]:
    """Each p as Holm's step-down correction leaves it, in the order given."""
    order = sorted(range(len(chances)), key=lambda index: chances[index])
    adjusted, most = [0.0] * len(chances), 0.0
    for rank, index in enumerate(order):
        most = max(most, min(1.0, (len(chances) - rank) * chances[index]))
        adjusted[index] = most
    return adjusted
