"""MMBench, English or Chinese: the letter of an option, asked once for each rotation of the options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Final

from vlmix.core.parts import SCORERS
from vlmix.core.sample import Judged, Row, State
from vlmix.core.scoring import Protocol, Scorer, Summary
from vlmix.evals.scoring._fields import columns, text_of, whole_of
from vlmix.evals.scoring._letters import lmms_letter, vlmevalkit_letter
from vlmix.evals.scoring._tally import grouped, mean

_CIRCULAR: Final = "vlmevalkit_circular_exact"
_VANILLA: Final = "vlmevalkit_vanilla_exact"
_LMMS: Final = "lmms_eval_static"
_VLMEVALKIT: Final = (
    "open-compass/VLMEvalKit@e8e78f05f3080fe28154f2130321f17951c3be94 "
    "vlmeval/dataset/utils/multiple_choice.py"
)
_ROTATION: Final = 1_000_000
_SHORT: Final = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}


@SCORERS.register("mmbench")
class MMBenchScorer(Scorer):
    """1 or 0. ``gold``: the letter.

    Questions whose ``index`` differs by millions are rotations of one: circular protocols give each of them 1
    if all were answered rightly, else 0, and nothing where the question with the smallest index is not among
    them. One answer that cannot be read is one that is wrong. VLMEvalKit looks for a single letter among the
    last four words, then for ``answer is X``, then for the text of a single option in a short enough answer;
    stops, brackets, ``#`` and ``*`` part words, and four ways to refuse make it Z. lmms-eval's static rule
    knows fewer brackets, takes ``A`` among more than three words for the article, allows E everywhere, and
    last picks a letter from whatever form it likes best, down to any capital in a word. Vanilla scores each
    rotation alone. Neither judge models nor VLMEvalKit's unseeded draw for what they cannot read are used.
    """

    protocols: ClassVar = {
        _CIRCULAR: Protocol(_VLMEVALKIT),
        _VANILLA: Protocol(_VLMEVALKIT),
        _LMMS: Protocol(
            "EvolvingLMMs-Lab/lmms-eval@75571cfe0fa36ca5ec2e6aa2bb268f9d38295af3 "
            "lmms_eval/tasks/mmbench/mmbench_evals.py"
        ),
    }
    fields: ClassVar = {
        "index": "the question's number, a million more for each rotation",
        "A": "the text of the first option",
        "B": "the text of the second option",
    }
    optional: ClassVar = {
        "C": "the text of the third option, or null",
        "D": "the text of the fourth option, or null",
        "E": "the text of the fifth option, or null",
        "category": "the ability that is tested",
        "l2_category": "the wider ability",
        "split": "dev or test",
    }

    def judge(self, rows: Sequence[Row], protocol: str) -> list[Judged]:
        """Each row on its own in vanilla, else each group of rotations."""
        letters = [_letter(row, protocol) for row in rows]
        right = [letter != "" and letter == row.gold for row, letter in zip(rows, letters, strict=True)]
        if protocol == _VANILLA:
            values: list[float | None] = [float(each) for each in right]
        else:
            hits = {group: float(all(some)) for group, some in _groups(rows, right).items()}
            whole = {index for row in rows if (index := _index(row)) < _ROTATION}
            values = [hits[group] if (group := _index(row) % _ROTATION) in whole else None for row in rows]
        return [
            Judged(value, letter, _state(row, letter))
            for value, letter, row in zip(values, letters, rows, strict=True)
        ]

    def summarise(self, rows: Sequence[Row], judged: Sequence[Judged], protocol: str) -> Summary:
        """VLMEvalKit's shares by split: over all, by wider ability (in its abbreviations) and by ability.

        Circular protocols count a group once. lmms-eval has no splits.
        """
        scored = [
            (row, each.value)
            for row, each in zip(rows, judged, strict=True)
            if each.value is not None and (protocol == _VANILLA or _index(row) < _ROTATION)
        ]
        if protocol == _LMMS:
            return {
                "overall_acc": mean([value for _, value in scored]),
                "category_acc": _by("category", scored),
                "l2_category_acc": _by("l2_category", scored),
            }
        splits: dict[str, list[tuple[Row, float]]] = {}
        for row, value in scored:
            splits.setdefault(str(row.fields.get("split", "none")), []).append((row, value))
        return {
            split: {
                "Overall": mean([value for _, value in some]),
                **_by("l2_category", some),
                **_by("category", some),
            }
            for split, some in splits.items()
        }


def _index(row: Row) -> int:
    return whole_of(row, "index")


def _groups(rows: Sequence[Row], right: Sequence[bool]) -> Mapping[int, Sequence[float]]:
    return grouped((_index(row) % _ROTATION, float(each)) for row, each in zip(rows, right, strict=True))


def _letter(row: Row, protocol: str) -> str:
    if row.answer is None:
        return ""
    if protocol == _LMMS:
        return lmms_letter(row.answer.strip(), columns(row, "ABCD"))
    return vlmevalkit_letter(row.answer, columns(row))


def _state(row: Row, letter: str) -> State:
    if row.answer is None:
        return "missing"
    return "read" if letter else "unparsed"


def _by(field: str, scored: Sequence[tuple[Row, float]]) -> Mapping[str, float]:
    groups = grouped(
        (text_of(row, field), value) for row, value in scored if row.fields.get(field) is not None
    )
    return {
        _SHORT.get(name, name) if field == "l2_category" else name: mean(groups[name])
        for name in sorted(groups)
    }
