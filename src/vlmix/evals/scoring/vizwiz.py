"""VizWiz: agreement with ten annotators on blind people's questions, many of which cannot be answered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final

from vlmix.core.parts import SCORERS
from vlmix.core.sample import Judged, Row
from vlmix.core.scoring import Protocol, Scorer, Summary
from vlmix.evals.scoring._tally import UNANSWERED, grouped, mean, percent, texts
from vlmix.evals.scoring._vqa_text import CONTRACTIONS, agreement, evalai, one_line, vqaeval_words

_OFFICIAL: Final = "vizwiz_api"
_LLAVA: Final = "llava_convert_then_vizwiz_api"
_LMMS: Final = "lmms_eval"
_UNANSWERABLE: Final = "unanswerable"
_STRAIGHT: Final = frozenset(
    {"ain't", "aren't", "can't", "could've", "couldn't", "we've", "where's", "who've"}
)
_STRAIGHT_KEYS: Final = frozenset({"couldn'tve", "hadn'tve"})
_CURLY: Final = str.maketrans("'", "\N{RIGHT SINGLE QUOTATION MARK}")
# VizWiz' table went through a word processor: all but the words above have typographic apostrophes, in what
# is looked for and in what it becomes.
_CONTRACTIONS: Final = {
    (key if key in _STRAIGHT_KEYS else key.translate(_CURLY)): (
        word if word in _STRAIGHT else word.translate(_CURLY)
    )
    for key, word in CONTRACTIONS.items()
}


@SCORERS.register("vizwiz")
class VizWizScorer(Scorer):
    """Percent with two decimals; lmms-eval a share of 1. ``gold``: the annotators' answers.

    VizWiz normalises the answer as VQAEval does and the annotators' never: an annotator who wrote ``Yes`` or
    ``a can`` cannot be met. ``dont`` becomes a word with a typographic apostrophe, which no plain one equals.
    LLaVA puts the answer through EvalAI's processor first. lmms-eval puts both sides through it.
    ``unanswerable`` is an answer like any other. Where questions say whether they are ``answerable``, how
    well the answer ``unanswerable`` finds those that are not is told as well. (The script wants a confidence
    for that; text gives 0 or 1. Its caption figures are left out: they need METEOR.)
    """

    protocols: ClassVar = {
        _OFFICIAL: Protocol(
            "VizWiz VQA API (vizwiz.org) PythonEvaluationTools/vqaEvaluation/vqaEval.py", full=100.0
        ),
        _LLAVA: Protocol(
            "haotian-liu/LLaVA@c121f0432da27facab705978f83c4ada465e46fd "
            "scripts/convert_vizwiz_for_submission.py, then vizwiz_api",
            full=100.0,
        ),
        _LMMS: Protocol(
            "EvolvingLMMs-Lab/lmms-eval@75571cfe0fa36ca5ec2e6aa2bb268f9d38295af3 "
            "lmms_eval/tasks/vizwiz_vqa/utils.py"
        ),
    }
    optional: ClassVar = {
        "answer_type": "yes/no, number, other or unanswerable",
        "answerable": "1 where the picture holds the answer, 0 where not",
    }
    units: ClassVar = {
        "overall_percent": "%",
        "perAnswerType_percent": "%",
        "unanswerability.average_precision_percent": "%",
        "unanswerability.f1_score_percent": "%",
    }

    def judge(self, rows: Sequence[Row], protocol: str) -> list[Judged]:
        """Each row on its own."""
        return [_judge(row, protocol) for row in rows]

    def summarise(self, rows: Sequence[Row], judged: Sequence[Judged], protocol: str) -> Summary:
        """Accuracy overall and by type of answer, and how well unanswerable questions are told."""
        pairs = [(row.fields, each) for row, each in zip(rows, judged, strict=True) if each.detail]
        shares = [each.detail["accuracy"] for _, each in pairs]
        if protocol == _LMMS:
            return {"exact_match": mean(shares)}
        groups = grouped(
            (str(fields["answer_type"]), each.detail["accuracy"])
            for fields, each in pairs
            if "answer_type" in fields
        )
        summary: dict[str, float | Summary] = {
            "overall_percent": percent(shares),
            "perAnswerType_percent": {kind: percent(values) for kind, values in groups.items()},
        }
        told = [
            (fields["answerable"] == 0, each.parsed == _UNANSWERABLE)
            for fields, each in pairs
            if "answerable" in fields
        ]
        return (
            {**summary, "unanswerability": _telling(told)} if any(wanted for wanted, _ in told) else summary
        )

    def failed(self, row: Row, judged: Judged, protocol: str) -> Judged:
        """No annotator agrees with it."""
        return Judged(0.0, state="failed", detail={"accuracy": 0.0})


def _judge(row: Row, protocol: str) -> Judged:
    if row.answer is None:
        return UNANSWERED
    golds = texts(row.gold)
    if protocol == _LMMS:
        answer, golds = evalai(row.answer), [evalai(gold) for gold in golds]
    else:
        submitted = evalai(row.answer) if protocol == _LLAVA else row.answer
        answer = vqaeval_words(one_line(submitted), _CONTRACTIONS)
    share = agreement(answer, golds)
    if share is None:
        return Judged(0.0, answer, detail={"accuracy": 0.0}) if protocol == _LMMS else Judged(None, answer)
    return Judged(share if protocol == _LMMS else round(100 * share, 2), answer, detail={"accuracy": share})


def _telling(told: list[tuple[bool, bool]]) -> dict[str, float]:
    """Average precision and F1 of pairs (is unanswerable, is said to be)."""
    hits = sum(wanted and said for wanted, said in told)
    wanted, said = sum(wanted for wanted, _ in told), sum(said for _, said in told)
    recall, precision = hits / wanted, hits / said if said else 0.0
    average = recall * precision + (1 - recall) * wanted / len(told)
    return {
        "average_precision_percent": round(100 * average, 2),
        "f1_score_percent": round(100 * 2 * hits / (wanted + said), 2),
    }
