"""ScienceQA, questions with a picture: an option's letter, in the few forms that LLaVA's script reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final

from vlmix.core.parts import SCORERS
from vlmix.core.sample import Judged, Row
from vlmix.core.scoring import Protocol, Scorer, Summary
from vlmix.evals.scoring._fields import letter_of_gold, list_of
from vlmix.evals.scoring._letters import llava_letter
from vlmix.evals.scoring._tally import UNANSWERED, mean

_OFFICIAL: Final = "llava_eval_science_qa"
_EAGLE: Final = "lmms_eval_eagle_fork"
_LETTERS: Final = "ABCDE"


@SCORERS.register("scienceqa_img")
class ScienceQAScorer(Scorer):
    """1 or 0. ``gold``: the right option's place in ``choices``, from 0, or its letter.

    LLaVA's script reads a letter from A to E alone, one before a full stop and a blank, or what follows the
    only ``The answer is ``. That pattern's dot is not escaped: it takes any character but a line break, and
    needs one, so ``The answer is A`` is not read, ``The answer is Alaska.`` is A, and two such sentences are
    none. A question without an answer is wrong, and no question with a picture. lmms-eval strips and takes
    the letter in any case, or a capital before a full stop (``A.foo``), leaving out questions without an
    answer; the copy that came with Eagle minds case and blanks.
    """

    protocols: ClassVar = {
        _OFFICIAL: Protocol(
            "haotian-liu/LLaVA@c121f0432da27facab705978f83c4ada465e46fd llava/eval/eval_science_qa.py"
        ),
        "lmms_eval": Protocol(
            "EvolvingLMMs-Lab/lmms-eval@75571cfe0fa36ca5ec2e6aa2bb268f9d38295af3 "
            "lmms_eval/tasks/scienceqa/utils.py"
        ),
        _EAGLE: Protocol(
            "NVlabs/EAGLE@fef95f103b5e9899acbbe2c237e5b99147ab7e8e lmms_eval/tasks/scienceqa/utils.py"
        ),
    }
    fields: ClassVar = {"choices": "the options in their order"}
    optional: ClassVar = {"has_image": "true where the question shows a picture"}
    units: ClassVar = {
        "acc_percent": "%",
        "IMG-Accuracy_percent": "%",
        "correct": "answers",
        "count": "questions",
    }

    def judge(self, rows: Sequence[Row], protocol: str) -> list[Judged]:
        """Each row on its own."""
        return [_official(row) if protocol == _OFFICIAL else _lmms(row, protocol) for row in rows]

    def summarise(self, rows: Sequence[Row], judged: Sequence[Judged], protocol: str) -> Summary:
        """LLaVA's accuracies of all questions and of those with a picture; lmms-eval's mean."""
        values = [each.value for each in judged if each.value is not None]
        if protocol != _OFFICIAL:
            return {"exact_match": mean(values)}
        pictured = [
            each.value or 0.0
            for row, each in zip(rows, judged, strict=True)
            if row.fields.get("has_image") and each.state != "missing"
        ]
        return {
            "acc_percent": 100 * mean(values),
            "correct": sum(values),
            "count": len(values),
            **({"IMG-Accuracy_percent": 100 * mean(pictured)} if pictured else {}),
        }


def _official(row: Row) -> Judged:
    if row.answer is None:
        return Judged(0.0, state="missing")
    letter = llava_letter(row.answer)
    offered = _LETTERS[: len(list_of(row, "choices"))]
    right = letter != "" and letter in offered and letter == letter_of_gold(row)
    return Judged(float(right), letter, "read" if letter else "unparsed")


def _lmms(row: Row, protocol: str) -> Judged:
    if row.answer is None:
        return UNANSWERED
    letter = _lone(row.answer) if protocol == _EAGLE else _lone(row.answer.strip()).upper()
    return Judged(float(letter == letter_of_gold(row)), letter, "read" if letter else "unparsed")


def _lone(answer: str) -> str:
    """A single character, or a capital before a full stop."""
    if len(answer) == 1 or (answer[1:2] == "." and answer[0].isupper()):
        return answer[0]
    return ""
