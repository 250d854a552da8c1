"""MME: yes or no to two statements about each picture; points for each that is right and for both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final

from vlmix.core.parts import SCORERS
from vlmix.core.sample import Judged, Row
from vlmix.core.scoring import Protocol, Scorer, Summary
from vlmix.evals.scoring._fields import text_of
from vlmix.evals.scoring._tally import UNANSWERED, mean

_OFFICIAL: Final = "mme_eval_tool"
_LMMS: Final = "lmms_eval"
_EAGLE: Final = "lmms_eval_eagle_fork"
_TASKS: Final = {
    "Perception": (
        "existence",
        "count",
        "position",
        "color",
        "posters",
        "celebrity",
        "scene",
        "landmark",
        "artwork",
        "OCR",
    ),
    "Cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}
_FIRST: Final = 4
_FULL: Final = {"Perception": "points of 2000", "Cognition": "points of 800"}


@SCORERS.register("mme")
class MMEScorer(Scorer):
    """1 or 0. ``gold``: Yes or No.

    The tool lower-cases the answer, strips nothing and looks for ``yes``, then ``no``, anywhere in the first
    four characters: ``eyes`` is yes, ``know`` and ``none`` are no, ``  yes`` is neither.
    It reads lines of a table, so that an answer with a tab, or none, is skipped: such a row has no value and
    leaves the accuracy's denominator, while its picture stays in that of accuracy+ (the share of pictures
    with both statements right). lmms-eval strips, deletes full stops, takes a lone ``y`` or ``n`` and scores
    no answer as empty text; the copy that came with Eagle does not know ``y`` and ``n``. A task's points are
    accuracy and accuracy+ in percent, added. Two rows of a task on the same ``image`` are a pair.
    """

    protocols: ClassVar = {
        _OFFICIAL: Protocol(
            "BradyFU/Awesome-Multimodal-Large-Language-Models@1c1d69e138b57cf8b0400427927bfb8ed4285458 "
            "tools/eval_tool.zip calculation.py"
        ),
        _LMMS: Protocol(
            "EvolvingLMMs-Lab/lmms-eval@75571cfe0fa36ca5ec2e6aa2bb268f9d38295af3 lmms_eval/tasks/mme/utils.py"
        ),
        _EAGLE: Protocol(
            "NVlabs/EAGLE@fef95f103b5e9899acbbe2c237e5b99147ab7e8e lmms_eval/tasks/mme/utils.py"
        ),
    }
    fields: ClassVar = {
        "category": "the task, such as existence",
        "image": "the picture, one name for both rows",
    }
    units: ClassVar = {
        **_FULL,
        **{f"{group}.total": full for group, full in _FULL.items()},
        **{f"{group}.{task}": "points of 200" for group, tasks in _TASKS.items() for task in tasks},
    }

    def judge(self, rows: Sequence[Row], protocol: str) -> list[Judged]:
        """Each row on its own."""
        return [_official(row) if protocol == _OFFICIAL else _lmms(row, protocol) for row in rows]

    def summarise(self, rows: Sequence[Row], judged: Sequence[Judged], protocol: str) -> Summary:
        """Points of the tasks that are there, and their sum for perception and for cognition."""
        tasks: dict[str, dict[str, list[float | None]]] = {}
        for row, each in zip(rows, judged, strict=True):
            pictures = tasks.setdefault(text_of(row, "category"), {})
            pictures.setdefault(text_of(row, "image"), []).append(each.value)
        points = {task: _points(list(pictures.values())) for task, pictures in tasks.items()}
        if protocol == _OFFICIAL:
            groups = {
                name: {task: points[task] for task in known if task in points}
                for name, known in _TASKS.items()
            }
            return {name: {"total": sum(some.values()), **some} for name, some in groups.items() if some}
        perceived = [value for task, value in points.items() if task in _TASKS["Perception"]]
        others = [value for task, value in points.items() if task not in _TASKS["Perception"]]
        sums = {"Perception": perceived, "Cognition": others}
        return {name: sum(values) for name, values in sums.items() if values}


def _official(row: Row) -> Judged:
    if row.answer is None:
        return UNANSWERED
    if "\t" in row.answer:
        return Judged(None, state="unparsed")
    return _judged(_label(row.answer.lower()), str(row.gold).lower())


def _lmms(row: Row, protocol: str) -> Judged:
    said = (row.answer or "").lower().strip().replace(".", "")
    if protocol == _LMMS:
        said = {"y": "yes", "n": "no"}.get(said, said)
    gold = str(row.gold).lower().strip().replace(".", "")
    return _judged(_label(said), gold) if row.answer is not None else Judged(0.0, state="missing")


def _label(said: str) -> str:
    return next((label for label in ("yes", "no") if label in said[:_FIRST]), "")


def _judged(label: str, gold: str) -> Judged:
    return Judged(float(label == gold), label, "read" if label else "unparsed")


def _points(pictures: Sequence[Sequence[float | None]]) -> float:
    """Accuracy of the answers that were read and the share of pairs that are right, in percent, added."""
    pairs = [values[start : start + 2] for values in pictures for start in range(0, len(values), 2)]
    read = [value for pair in pairs for value in pair if value is not None]
    return 100 * mean(read) + 100 * mean([float(list(pair) == [1.0, 1.0]) for pair in pairs])
