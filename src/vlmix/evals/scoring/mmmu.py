"""MMMU: college questions with pictures, with options or without; accuracy by subject and discipline."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar, Final

from vlmix.core.errors import InputError
from vlmix.core.parts import SCORERS
from vlmix.core.sample import Judged, Row
from vlmix.core.scoring import Protocol, Scorer, Summary
from vlmix.evals.scoring._fields import list_of, text_of
from vlmix.evals.scoring._mmmu import letter_of, meanings, open_answer_is_right
from vlmix.evals.scoring._tally import UNANSWERED, grouped, mean, texts

_OFFICIAL: Final = "mmmu_official"
_LMMS: Final = "lmms_eval"
_SEED: Final = 42
_SUBJECT: Final = re.compile(r"[^_]*_(.+?)_\d+")
_DISCIPLINES: Final = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}


@SCORERS.register("mmmu")
class MMMUScorer(Scorer):
    """1 or 0. ``gold``: a letter; for open questions a text, or all accepted ones.

    A letter in brackets counts, else one between blanks, else an option's text in more than five words; of
    several the last. Where nothing is found the official rule draws a letter, from a generator with the seed
    42 that moves on from row to row, and lmms-eval one that nobody can know, so that there is no value; as a
    share, it counts nothing. lmms-eval also takes a letter before a blank or full stop that ends a word
    (``BETA is`` is A). Open questions: the shortest tail behind words such as ``is`` or ``answer`` in each
    line, and all numbers in it, rounded to two decimals; a gold text has to be part of it. lmms-eval keeps
    but one of these and compares its single characters, which makes every open question wrong; the copy that
    came with Eagle compares as the official rule does.
    """

    protocols: ClassVar = {
        _OFFICIAL: Protocol(
            "MMMU-Benchmark/MMMU@bb0b95a945998d91dfef37e969e07d49d1139438 mmmu/utils/eval_utils.py"
        ),
        _LMMS: Protocol(
            "EvolvingLMMs-Lab/lmms-eval@75571cfe0fa36ca5ec2e6aa2bb268f9d38295af3 "
            "lmms_eval/tasks/mmmu/utils.py"
        ),
        "lmms_eval_eagle_fork": Protocol(
            "NVlabs/EAGLE@fef95f103b5e9899acbbe2c237e5b99147ab7e8e lmms_eval/tasks/mmmu/utils.py"
        ),
    }
    fields: ClassVar = {"question_type": "multiple-choice or open"}
    optional: ClassVar = {
        "index2ans": "the options by their letters, for multiple choice",
        "all_choices": "the letters, where the options above are out of order",
        "subject": "such as Art_Theory; else taken from an id such as validation_Art_Theory_7",
    }

    def judge(self, rows: Sequence[Row], protocol: str) -> list[Judged]:
        """Rows in order: what was drawn for one depends on those before it."""
        draws = random.Random(_SEED)
        return [_judge(row, protocol, draws) for row in rows]

    def summarise(self, rows: Sequence[Row], judged: Sequence[Judged], protocol: str) -> Summary:
        """Accuracy over all, by discipline and by subject; no value counts as wrong."""
        scored = [(_subject(row), each.value or 0.0) for row, each in zip(rows, judged, strict=True)]
        subjects = grouped((subject, value) for subject, value in scored if subject)
        summary = dict[str, float | Summary]()
        for discipline, members in _DISCIPLINES.items():
            inside = {subject: subjects[subject] for subject in members if subject in subjects}
            if inside:
                summary[f"Overall-{discipline}"] = mean(
                    [value for values in inside.values() for value in values]
                )
                summary.update({subject: mean(values) for subject, values in inside.items()})
        return {**summary, "Overall": mean([value for _, value in scored])}


def _judge(row: Row, protocol: str, draws: random.Random) -> Judged:
    if row.answer is None:
        return UNANSWERED
    if text_of(row, "question_type") != "multiple-choice":
        return _judge_open(row, row.answer, protocol)
    options = _options(row)
    letter = letter_of(row.answer, options, glued=protocol != _OFFICIAL)
    if letter:
        return Judged(float(letter in texts(row.gold)), letter)
    if protocol != _OFFICIAL:
        return Judged(None, state="guessed")
    drawn = draws.choice(list(options))
    return Judged(float(drawn in texts(row.gold)), drawn, "guessed")


def _judge_open(row: Row, answer: str, protocol: str) -> Judged:
    said = meanings(answer)
    compared = list(str(said[0])) if protocol == _LMMS else said
    right = open_answer_is_right(compared, texts(row.gold))
    return Judged(float(right), " | ".join(str(each) for each in said))


def _options(row: Row) -> Mapping[str, str]:
    options = row.fields.get("index2ans")
    if not isinstance(options, Mapping) or not options:
        raise InputError(
            f"question {row.id}: `index2ans` must hold the options by their letters, not {options!r}"
        )
    letters = list_of(row, "all_choices") if row.fields.get("all_choices") else list(options)
    return {str(letter): str(options[str(letter)]) for letter in letters}


def _subject(row: Row) -> str:
    named = row.fields.get("subject")
    if named is not None:
        return str(named)
    found = _SUBJECT.fullmatch(row.id)
    return found[1] if found else ""
