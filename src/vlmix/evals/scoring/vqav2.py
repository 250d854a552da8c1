"""VQAv2: agreement with ten annotators, an answer counting in full where three others gave it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final

from vlmix.core.parts import SCORERS
from vlmix.core.sample import Judged, Row
from vlmix.core.scoring import Protocol, Scorer, Summary
from vlmix.evals.scoring._tally import UNANSWERED, grouped, mean, percent, texts
from vlmix.evals.scoring._vqa_text import agreement, evalai, evalai_words, one_line, vqaeval_words

_OFFICIAL: Final = "vqaeval_official"
_LLAVA: Final = "llava_convert_then_vqaeval"
_LMMS: Final = "lmms_eval"


@SCORERS.register("vqav2")
class VQAv2Scorer(Scorer):
    """Percent with two decimals in VQAEval; a share of 1 in lmms-eval. ``gold``: every annotator's answer.

    VQAEval normalises the answer, and the annotators', only where the annotators did not all write the same:
    with ten times ``yes``, ``Yes`` is wrong. LLaVA submits what EvalAI's processor made of the answer, which
    glues words at commas, splits ``'s`` off and loses the article that ten annotators may all have written;
    a question without an answer is submitted as empty text. lmms-eval always normalises. Annotators without
    a number of their own (``gold_has_answer_id: false``) are compared by their words, so that putting one
    aside puts all of the same words aside.
    """

    protocols: ClassVar = {
        _OFFICIAL: Protocol(
            "GT-Vision-Lab/VQA@a013f0043c1e2cdc995922dfe257f7149aa9af06 "
            "PythonEvaluationTools/vqaEvaluation/vqaEval.py",
            full=100.0,
        ),
        _LLAVA: Protocol(
            "haotian-liu/LLaVA@c121f0432da27facab705978f83c4ada465e46fd "
            "scripts/convert_vqav2_for_submission.py, then vqaeval_official",
            full=100.0,
        ),
        _LMMS: Protocol(
            "EvolvingLMMs-Lab/lmms-eval@75571cfe0fa36ca5ec2e6aa2bb268f9d38295af3 "
            "lmms_eval/tasks/vqav2/utils.py"
        ),
    }
    optional: ClassVar = {
        "question_type": "how the question begins",
        "answer_type": "yes/no, number or other",
        "gold_has_answer_id": "false where annotators have no number of their own",
    }
    units: ClassVar = {"overall_percent": "%", "perQuestionType_percent": "%", "perAnswerType_percent": "%"}

    def judge(self, rows: Sequence[Row], protocol: str) -> list[Judged]:
        """Each row on its own."""
        return [_judge(row, protocol) for row in rows]

    def summarise(self, rows: Sequence[Row], judged: Sequence[Judged], protocol: str) -> Summary:
        """VQAEval's accuracies, overall and by type, of unrounded shares; lmms-eval's mean."""
        shares = [
            (row.fields, each.detail["accuracy"])
            for row, each in zip(rows, judged, strict=True)
            if each.detail
        ]
        if protocol == _LMMS:
            return {"exact_match": mean([share for _, share in shares])}
        summary: dict[str, float | Summary] = {"overall_percent": percent([share for _, share in shares])}
        for field, name in (("question_type", "perQuestionType"), ("answer_type", "perAnswerType")):
            groups = grouped((str(fields[field]), share) for fields, share in shares if field in fields)
            summary[f"{name}_percent"] = {kind: percent(values) for kind, values in groups.items()}
        return summary

    def failed(self, row: Row, judged: Judged, protocol: str) -> Judged:
        """No annotator agrees with it."""
        return Judged(0.0, state="failed", detail={"accuracy": 0.0})


def _judge(row: Row, protocol: str) -> Judged:
    if row.answer is None and protocol != _LLAVA:
        return UNANSWERED
    submitted = row.answer or ""
    if protocol == _LLAVA:
        submitted = evalai(submitted)
    answer, golds = one_line(submitted), [one_line(gold) for gold in texts(row.gold)]
    if protocol == _LMMS:
        answer, golds = evalai_words(answer), [evalai_words(gold) for gold in golds]
    elif len(set(golds)) > 1:
        answer, golds = vqaeval_words(answer), [vqaeval_words(gold) for gold in golds]
    nameless = row.fields.get("gold_has_answer_id") is False
    share = agreement(answer, golds, alike_leave_together=nameless)
    state = "missing" if row.answer is None else "read"
    parsed = submitted if protocol == _LLAVA else answer
    if share is None:
        return Judged(None, parsed, state)
    value = share if protocol == _LMMS else round(100 * share, 2)
    return Judged(value, parsed, state, {"accuracy": share})
