"""TextVQA: agreement with ten annotators after EvalAI's normalisation, always on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final

from vlmix.core.parts import SCORERS
from vlmix.core.sample import Judged, Row
from vlmix.core.scoring import Protocol, Scorer, Summary
from vlmix.evals.scoring._tally import UNANSWERED, mean, percent, texts
from vlmix.evals.scoring._vqa_text import agreement, evalai

_OFFICIAL: Final = "m4c_evaluator"
_ANNOTATORS: Final = 10


@SCORERS.register("textvqa")
class TextVQAScorer(Scorer):
    """A share of 1. ``gold``: the ten annotators' answers; M4C refuses any other number, lmms-eval does not.

    Commas and question marks vanish before anything else, so that ``1,299.99`` is ``1299.99``, and ``'s``
    becomes a word of its own. The two protocols agree on every question of ten annotators.
    """

    protocols: ClassVar = {
        _OFFICIAL: Protocol(
            "haotian-liu/LLaVA@c121f0432da27facab705978f83c4ada465e46fd llava/eval/eval_textvqa.py and "
            "llava/eval/m4c_evaluator.py"
        ),
        "lmms_eval": Protocol(
            "EvolvingLMMs-Lab/lmms-eval@75571cfe0fa36ca5ec2e6aa2bb268f9d38295af3 "
            "lmms_eval/tasks/textvqa/utils.py"
        ),
    }
    units: ClassVar = {"accuracy_percent": "%"}

    def judge(self, rows: Sequence[Row], protocol: str) -> list[Judged]:
        """Each row on its own."""
        return [_judge(row, protocol) for row in rows]

    def summarise(self, rows: Sequence[Row], judged: Sequence[Judged], protocol: str) -> Summary:
        """The mean: in percent as LLaVA prints it, or as a share."""
        values = [each.value for each in judged if each.value is not None]
        return (
            {"accuracy_percent": percent(values)} if protocol == _OFFICIAL else {"exact_match": mean(values)}
        )


def _judge(row: Row, protocol: str) -> Judged:
    if row.answer is None:
        return UNANSWERED
    answer, golds = evalai(row.answer), [evalai(gold) for gold in texts(row.gold)]
    if protocol == _OFFICIAL and len(golds) != _ANNOTATORS:
        return Judged(None, answer)
    return Judged(agreement(answer, golds), answer)
