"""How both NLVR scripts read true and false, and the two figures that they print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from vlmix.core.sample import Judged, Row
from vlmix.evals.scoring._tally import UNANSWERED, grouped, mean

LABELS: Final = frozenset({"true", "false"})


def read_truth(answer: str) -> str:
    """The answer's field in a line of a table of commas, lower-cased; blanks before it stay."""
    return answer.rstrip().partition(",")[0].lower()


def judged_truth(row: Row) -> Judged:
    """1 if the answer is the label."""
    if row.answer is None:
        return UNANSWERED
    said = read_truth(row.answer)
    value = float(said == str(row.gold).lower())
    return Judged(value, said) if said in LABELS else Judged(value, state="unparsed")


def right_and_consistent(sentences: Sequence[str], values: Sequence[float]) -> tuple[float, float]:
    """The share of right answers, and that of sentences with right answers only."""
    groups = grouped(zip(sentences, values, strict=True))
    return mean(values), mean([min(some) for some in groups.values()])
