"""AI2D: the letter of one of four options about a diagram."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import ClassVar, Final

from vlmix.core.parts import SCORERS
from vlmix.core.sample import Judged, Row
from vlmix.core.scoring import Protocol, Scorer, Summary
from vlmix.evals.scoring._fields import letter_of_gold, lettered, list_of
from vlmix.evals.scoring._letters import llava_letter, vlmevalkit_letter
from vlmix.evals.scoring._tally import UNANSWERED, mean

_OFFICIAL: Final = "lmms_eval"
_VLMEVALKIT: Final = "vlmevalkit_exact"
_LEADING: Final = re.compile(r"\s*([A-Z])\.")
_NO_PUNCTUATION: Final = str.maketrans("", "", string.punctuation)


@SCORERS.register("ai2d")
class AI2DScorer(Scorer):
    """1 or 0. ``gold``: the right option's place in ``options``, from 0, or its letter.

    The data set came without a rule for text. lmms-eval's is the usual one: a capital before a full stop at
    the beginning, else the whole answer, must be the letter when case and punctuation are taken away, so
    ``(B)`` and ``b)`` are right and ``B because`` is wrong. VLMEvalKit reads as in ``mmbench`` without a
    judge; LLaVA's letter rule is that of ``scienceqa_img``.
    """

    protocols: ClassVar = {
        _OFFICIAL: Protocol(
            "EvolvingLMMs-Lab/lmms-eval@75571cfe0fa36ca5ec2e6aa2bb268f9d38295af3 "
            "lmms_eval/tasks/ai2d/utils.py"
        ),
        _VLMEVALKIT: Protocol(
            "open-compass/VLMEvalKit@e8e78f05f3080fe28154f2130321f17951c3be94 "
            "vlmeval/dataset/utils/multiple_choice.py"
        ),
        "llava_letter": Protocol(
            "haotian-liu/LLaVA@c121f0432da27facab705978f83c4ada465e46fd llava/eval/eval_science_qa.py"
        ),
    }
    fields: ClassVar = {"options": "the options in their order"}

    def judge(self, rows: Sequence[Row], protocol: str) -> list[Judged]:
        """Each row on its own."""
        return [_judge(row, protocol) for row in rows]

    def summarise(self, rows: Sequence[Row], judged: Sequence[Judged], protocol: str) -> Summary:
        """The mean; no answer counts as wrong."""
        return {
            "exact_match" if protocol == _OFFICIAL else "accuracy": mean(
                [each.value or 0.0 for each in judged]
            )
        }


def _judge(row: Row, protocol: str) -> Judged:
    if row.answer is None:
        return UNANSWERED
    options = lettered(list_of(row, "options"))
    letter = _letter(row.answer, options, protocol)
    value = float(letter == letter_of_gold(row))
    return Judged(value, letter) if letter else Judged(value, state="unparsed")


def _letter(answer: str, options: Mapping[str, str], protocol: str) -> str:
    if protocol == _VLMEVALKIT:
        return vlmevalkit_letter(answer, options)
    if protocol != _OFFICIAL:
        return llava_letter(answer)
    leading = _LEADING.match(answer)
    said = leading[1] if leading else answer.strip().upper().translate(_NO_PUNCTUATION)
    return said if said in options else ""
