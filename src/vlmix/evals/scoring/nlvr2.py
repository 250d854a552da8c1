"""NLVR2: true or false of a sentence about a pair of photographs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from vlmix.core.parts import SCORERS
from vlmix.core.sample import Judged, Row
from vlmix.core.scoring import Protocol, Scorer, Summary
from vlmix.evals.scoring._truth import judged_truth, right_and_consistent


@SCORERS.register("nlvr2")
class NLVR2Scorer(Scorer):
    """1 or 0. ``gold``: True or False. Read as in ``nlvr``.

    Consistency is the share of sentences without a wrong answer. Questions share a sentence if their ids, of
    four parts such as ``dev-3-1-0``, differ in the third part only.
    """

    protocols: ClassVar = {
        "nlvr2_metrics": Protocol(
            "lil-lab/nlvr@18924841aa96d519cfb8584f0945350f07a6d860 nlvr2/eval/metrics.py"
        )
    }

    def judge(self, rows: Sequence[Row], protocol: str) -> list[Judged]:
        """Each row on its own."""
        return [judged_truth(row) for row in rows]

    def summarise(self, rows: Sequence[Row], judged: Sequence[Judged], protocol: str) -> Summary:
        """``accuracy`` over all answers and ``consistency`` over sentences."""
        sentences = [_sentence(row.id) for row in rows]
        accuracy, consistency = right_and_consistent(sentences, [each.value or 0.0 for each in judged])
        return {"accuracy": accuracy, "consistency": consistency}


def _sentence(identifier: str) -> str:
    parts = identifier.split("-")
    return "-".join([*parts[:2], "", *parts[3:]])
