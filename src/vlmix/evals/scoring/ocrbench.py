"""OCRBench: is a gold text part of the answer? 1,000 questions, a point each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final

from vlmix.core.parts import SCORERS
from vlmix.core.sample import Judged, Row
from vlmix.core.scoring import Protocol, Scorer, Summary
from vlmix.evals.scoring._fields import text_of
from vlmix.evals.scoring._tally import UNANSWERED, grouped, mean, texts

_OFFICIAL: Final = "ocrbench_official"
_LMMS: Final = "lmms_eval"
_EAGLE: Final = "lmms_eval_eagle_fork"
_FORMULAS: Final = "HME100k"
_QUESTIONS: Final = 1000
_RECOGNITION: Final = (
    "Regular Text Recognition",
    "Irregular Text Recognition",
    "Artistic Text Recognition",
    "Handwriting Recognition",
    "Digit String Recognition",
    "Non-Semantic Text Recognition",
)
_TYPES: Final = (
    *_RECOGNITION,
    "Scene Text-centric VQA",
    "Doc-oriented VQA",
    "Key Information Extraction",
    "Handwritten Mathematical Expression Recognition",
)
_NARROW: Final = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}


@SCORERS.register("ocrbench")
class OCRBenchScorer(Scorer):
    """1 or 0. ``gold``: a text, or several of which any may be hit.

    A hit is a gold text anywhere in the answer: ``5`` is in ``2025``, and an empty one is in everything.
    Both sides are lower-cased and stripped, line ends are blanks. Formulas (``HME100k``) keep their case and
    lose all blanks; other white space inside them stays. A question without an answer is skipped.
    lmms-eval folds full-width characters into plain ones first, but not in formulas. Eagle's copy
    lower-cases the answer of a formula, and not its gold text.
    """

    protocols: ClassVar = {
        _OFFICIAL: Protocol(
            "Yuliang-Liu/MultimodalOCR@794c36d6423cf1d5764081128bcaeb46b240def6 OCRBench/scripts/LLaVA1_5.py"
        ),
        _LMMS: Protocol(
            "EvolvingLMMs-Lab/lmms-eval@75571cfe0fa36ca5ec2e6aa2bb268f9d38295af3 "
            "lmms_eval/tasks/ocrbench/utils.py"
        ),
        _EAGLE: Protocol(
            "NVlabs/EAGLE@fef95f103b5e9899acbbe2c237e5b99147ab7e8e lmms_eval/tasks/ocrbench/utils.py"
        ),
    }
    fields: ClassVar = {"type": "the kind of question", "dataset_name": "the data set it is from"}
    units: ClassVar = dict.fromkeys((*_TYPES, "Text Recognition", "Final Score"), "points")

    def judge(self, rows: Sequence[Row], protocol: str) -> list[Judged]:
        """Each row on its own."""
        return [_judge(row, protocol) for row in rows]

    def summarise(self, rows: Sequence[Row], judged: Sequence[Judged], protocol: str) -> Summary:
        """Points by kind, of recognition and in all; lmms-eval's thousandth part of that.

        Of a set that has not its 1,000 questions, the official script tells shares by data set instead.
        """
        values = [each.value or 0.0 for each in judged]
        if protocol != _OFFICIAL:
            return {"ocrbench_accuracy": sum(values) / _QUESTIONS}
        points = dict.fromkeys(list[str](_TYPES), 0.0)
        for row, value in zip(rows, values, strict=True):
            kind = text_of(row, "type")
            points[kind] = points.get(kind, 0.0) + value
        summary: dict[str, float | Summary] = {
            **points,
            "Text Recognition": sum(points[kind] for kind in _RECOGNITION),
            "Final Score": sum(points.values()),
        }
        if len(rows) == _QUESTIONS:
            return summary
        sets = grouped((text_of(row, "dataset_name"), value) for row, value in zip(rows, values, strict=True))
        return {**summary, "datasets": {name: mean(some) for name, some in sets.items()}}


def _judge(row: Row, protocol: str) -> Judged:
    if row.answer is None:
        return UNANSWERED
    formula = text_of(row, "dataset_name") == _FORMULAS
    said = _normalised(row.answer, protocol, formula)
    said = said.lower() if protocol == _EAGLE else said
    hit = any(_normalised(gold, protocol, formula) in said for gold in texts(row.gold))
    return Judged(float(hit), said)


def _normalised(text: str, protocol: str, formula: bool) -> str:
    if formula:
        return text.strip().replace("\n", "").replace(" ", "")
    if protocol == _LMMS:
        text = text.translate(_NARROW)
    return text.lower().strip().replace("\n", " ")
