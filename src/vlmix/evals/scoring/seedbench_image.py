"""SEED-Bench, questions about pictures: the letter of one of four options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final

from vlmix.core.parts import SCORERS
from vlmix.core.sample import Judged, Row
from vlmix.core.scoring import Protocol, Scorer, Summary
from vlmix.evals.scoring._fields import text_of
from vlmix.evals.scoring._tally import UNANSWERED, grouped, mean, percent

_OFFICIAL: Final = "llava_convert_seed"
_EAGLE: Final = "lmms_eval_eagle_fork"
_LETTERS: Final = frozenset("ABCD")


@SCORERS.register("seedbench_image")
class SeedBenchImageScorer(Scorer):
    """1 or 0. ``gold``: the letter.

    LLaVA's script wants the letter and nothing else: ``C.`` and a blank before it are wrong, and so is a
    question without an answer. (It fails where no question of some type was answered rightly; here that
    type has 0.) lmms-eval strips and takes the first character in any case, so ``Apple`` is A and ``The
    answer is C`` is T, and leaves out questions without an answer; the copy that came with Eagle minds case.
    SEED-Bench's own script ranks options by likelihood and reads no text.
    """

    protocols: ClassVar = {
        _OFFICIAL: Protocol(
            "haotian-liu/LLaVA@c121f0432da27facab705978f83c4ada465e46fd "
            "scripts/convert_seed_for_submission.py"
        ),
        "lmms_eval": Protocol(
            "EvolvingLMMs-Lab/lmms-eval@75571cfe0fa36ca5ec2e6aa2bb268f9d38295af3 "
            "lmms_eval/tasks/seedbench/utils.py"
        ),
        _EAGLE: Protocol(
            "NVlabs/EAGLE@fef95f103b5e9899acbbe2c237e5b99147ab7e8e lmms_eval/tasks/seedbench/utils.py"
        ),
    }
    optional: ClassVar = {"data_type": "image or video", "question_type_id": "the kind of question"}
    units: ClassVar = {f"{name}_percent": "%" for name in ("question_type", "total", "image", "video")}

    def judge(self, rows: Sequence[Row], protocol: str) -> list[Judged]:
        """Each row on its own."""
        return [_official(row) if protocol == _OFFICIAL else _lmms(row, protocol) for row in rows]

    def summarise(self, rows: Sequence[Row], judged: Sequence[Judged], protocol: str) -> Summary:
        """LLaVA's accuracies by type of question, of pictures, videos and all; lmms-eval's as shares."""
        scored = [(row, each.value) for row, each in zip(rows, judged, strict=True) if each.value is not None]
        values = [value for _, value in scored]
        kinds = grouped(
            (text_of(row, "data_type"), value) for row, value in scored if "data_type" in row.fields
        )
        if protocol != _OFFICIAL:
            return {**{f"seed_{kind}": mean(some) for kind, some in kinds.items()}, "seed_all": mean(values)}
        types = grouped(
            (text_of(row, "question_type_id"), value)
            for row, value in scored
            if "question_type_id" in row.fields
        )
        return {
            "question_type_percent": {name: percent(types[name]) for name in sorted(types, key=_by_number)},
            "total_percent": percent(values),
            **{f"{kind}_percent": percent(some) for kind, some in kinds.items()},
        }


def _official(row: Row) -> Judged:
    if row.answer is None:
        return Judged(0.0, state="missing")
    return _judged(row.answer == row.gold, row.answer)


def _lmms(row: Row, protocol: str) -> Judged:
    if row.answer is None:
        return UNANSWERED
    said, gold = row.answer.strip()[:1], str(row.gold)
    if protocol == _EAGLE:
        return _judged(said == gold, said)
    return _judged(said.lower().strip() == gold.lower().strip(), said.upper())


def _judged(right: bool, said: str) -> Judged:
    return Judged(float(right), said) if right or said in _LETTERS else Judged(0.0, state="unparsed")


def _by_number(name: str) -> tuple[int, str]:
    return len(name), name
