"""The figures of one judged trial without each block of a benchmark's questions, block by block.

They are computed again from the judged answers where these give the figure. Official rules read more than the
answers that a report keeps: such a figure's replicates stand in ``replicates.json``, unless it is the mean of
the scores, which has none because it needs none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from vlmix.core.errors import InputError
from vlmix.core.interfaces import Benchmark
from vlmix.core.sample import Score
from vlmix.evals.jackknife import Dealt
from vlmix.evals.past_runs import PastResult
from vlmix.search.trial import named_figures

Replicates = dict[str, tuple[str, NDArray[np.float64]]]
"""By benchmark: the name of how its questions were dealt, and a value without each block."""

_SAME: Final = 2e-6  # answers and ledgers are exact; figures and values of reports have six digits
_FEWEST_BLOCKS: Final = 8
_SCALES: Final = (1.0, 100.0)
# What formulas raise on too few scores, or where a score lacks what an official rule reads.
_UNDEFINED: Final = (InputError, ArithmeticError, LookupError, ValueError, TypeError, AttributeError)


@dataclass(frozen=True, slots=True)
class Blocks:
    """``figures`` without each block; ``dealing`` is the same for the same questions in the same blocks."""

    dealing: str
    figures: Sequence[Mapping[str, float]]


def figures_by_block(
    name: str, benchmark: Benchmark, result: PastResult, wanted: Mapping[str, float]
) -> Blocks | None:
    """The ``wanted`` figures, whose values are given, by the names formulas use; ``name`` is the benchmark's.

    ``None`` where the report does not tell one of them, or there are fewer than 8 groups of questions.
    """
    scores = [answer.score for answer in result.answers.values()]
    dealt = Dealt.deal(scores, seed=0)
    if dealt.count < _FEWEST_BLOCKS:
        return None
    parts = [dealt.without(block) for block in range(dealt.count)]
    whole, left = _figures(name, benchmark, scores), [_figures(name, benchmark, part) for part in parts]
    for figure, value in wanted.items():
        if abs(whole.get(figure, math.nan) - value) < _SAME:
            continue
        kept = result.replicates.get(figure.removeprefix(f"{name}."), [])
        if result.blocks != dealt.name or len(kept) != dealt.count:
            scale = next((s for s in _SCALES if abs(s * _mean(scores) - value) < s * _SAME), None)
            if scale is None:
                return None
            kept = [scale * _mean(part) for part in parts]
        for each, replicate in zip(left, kept, strict=True):
            each[figure] = replicate
    return Blocks(dealt.name, left)


def _figures(name: str, benchmark: Benchmark, scores: Sequence[Score]) -> dict[str, float]:
    try:
        return named_figures(name, benchmark.summarise(scores), scores)
    except _UNDEFINED:
        return named_figures(name, {}, scores)


def _mean(scores: Sequence[Score]) -> float:
    values = [score.value for score in scores if score.counted]
    return math.fsum(values) / len(values) if values else math.nan
