"""ChartQA: relaxed accuracy, a number within five percent of the gold one or the same text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final

from vlmix.core.parts import SCORERS
from vlmix.core.sample import Judged, Row
from vlmix.core.scoring import Protocol, Scorer, Summary
from vlmix.evals.scoring._tally import UNANSWERED, mean, texts

_OFFICIAL: Final = "pix2struct"
_QWEN: Final = "qwen_vl"
_TOLERANCE: Final = 0.05
_HUMAN: Final = "human_test"


@SCORERS.register("chartqa")
class ChartQAScorer(Scorer):
    """1 or 0. ``gold``: one text, or several of which any may be met.

    A number is what Python's ``float`` reads, so ``1e2``, ``1_00`` and full-width digits are numbers while
    ``1,234`` and ``$45`` are text; one with a percent sign at its end (or several) is divided by a hundred.
    Text has to be equal but for case. A gold of zero is only ever met as text (``0`` is not ``0.0``), one of
    ``nan`` or ``inf`` never. Just five percent may fall either way by rounding. Qwen-VL strips the answer and
    hands it over in the place of the gold: its five percent, and its zero, are the answer's.
    """

    protocols: ClassVar = {
        _OFFICIAL: Protocol(
            "google-research/pix2struct@945f27e936c9464d9d7c133f1bd1f4f383be9e99 pix2struct/metrics.py"
        ),
        _QWEN: Protocol("QwenLM/Qwen-VL@aa00ed04091eea5fcdd32985e7915f1c53e7d599 eval_mm/evaluate_vqa.py"),
        "lmms_eval": Protocol(
            "EvolvingLMMs-Lab/lmms-eval@75571cfe0fa36ca5ec2e6aa2bb268f9d38295af3 "
            "lmms_eval/tasks/chartqa/utils.py"
        ),
    }
    optional: ClassVar = {"type": "human_test or augmented_test"}
    units: ClassVar = {
        "relaxed_accuracy_percent": "%",
        "relaxed_human_split_percent": "%",
        "relaxed_augmented_split_percent": "%",
    }

    def judge(self, rows: Sequence[Row], protocol: str) -> list[Judged]:
        """Each row on its own."""
        return [_judge(row, protocol) for row in rows]

    def summarise(self, rows: Sequence[Row], judged: Sequence[Judged], protocol: str) -> Summary:
        """The mean over all, over people's questions and over those made by machine, where there are such."""
        pairs = [(row.fields.get("type"), each.value) for row, each in zip(rows, judged, strict=True)]
        scored = [(kind, value) for kind, value in pairs if value is not None]
        splits = {
            "relaxed_accuracy" if protocol != "lmms_eval" else "relaxed_overall": scored,
            "relaxed_human_split": [pair for pair in scored if pair[0] == _HUMAN],
            "relaxed_augmented_split": [pair for pair in scored if pair[0] not in {_HUMAN, None}],
        }
        means = {name: mean([value for _, value in some]) for name, some in splits.items() if some}
        if protocol == _OFFICIAL:
            return {f"{name}_percent": 100 * value for name, value in means.items()}
        return means


def _judge(row: Row, protocol: str) -> Judged:
    if row.answer is None:
        return UNANSWERED
    answer = row.answer.strip() if protocol == _QWEN else row.answer
    golds = texts(row.gold)
    if not golds:
        return Judged(None, answer)
    pairs = [(answer, gold) if protocol == _QWEN else (gold, answer) for gold in golds]
    return Judged(float(any(_close(target, prediction) for target, prediction in pairs)), answer)


def _close(target: str, prediction: str) -> bool:
    wanted, found = _number(target), _number(prediction)
    if found is None or not wanted:
        return prediction.lower() == target.lower()
    return abs(found - wanted) / abs(wanted) <= _TOLERANCE


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None
