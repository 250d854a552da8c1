"""NLVR over pictures: true or false of a sentence, for each of six orders of the boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from vlmix.core.parts import SCORERS
from vlmix.core.sample import Judged, Row
from vlmix.core.scoring import Protocol, Scorer, Summary
from vlmix.evals.scoring._fields import text_of
from vlmix.evals.scoring._truth import judged_truth, right_and_consistent


@SCORERS.register("nlvr")
class NLVRScorer(Scorer):
    """1 or 0. ``gold``: true or false.

    The script reads a table of commas, so that an answer ends at its first comma; what is blank at the end
    of the line does not count, and the rest has to be the label in any case: a blank before it and ``yes``
    are wrong. Consistency is the share of sentences (the first number of ``example``) without a wrong answer
    in any order of any of their examples.
    """

    protocols: ClassVar = {
        "nlvr1_metrics_images": Protocol(
            "clic-lab/nlvr@3afe9e57355ab49fb92a0dc231436e583d67d125 nlvr/metrics_images.py"
        )
    }
    fields: ClassVar = {"example": "the sentence's number and the scene's, such as 12-0"}

    def judge(self, rows: Sequence[Row], protocol: str) -> list[Judged]:
        """Each row on its own."""
        return [judged_truth(row) for row in rows]

    def summarise(self, rows: Sequence[Row], judged: Sequence[Judged], protocol: str) -> Summary:
        """``precision`` over all answers and ``consistency`` over sentences."""
        sentences = [text_of(row, "example").partition("-")[0] for row in rows]
        precision, consistency = right_and_consistent(sentences, [each.value or 0.0 for each in judged])
        return {"precision": precision, "consistency": consistency}
