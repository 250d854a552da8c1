"""MathVista: the extracted answer, made a number, list or option as the question asks, equals the gold."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar, Final

from vlmix.core.parts import SCORERS
from vlmix.core.sample import Json, Judged, Row
from vlmix.core.scoring import Protocol, Scorer, Summary
from vlmix.evals.scoring._edits import edit_distance
from vlmix.evals.scoring._fields import lettered, text_of
from vlmix.evals.scoring._tally import UNANSWERED, grouped, mean

_OFFICIAL: Final = "mathvista_official"
_IGNORE_EMPTY: Final = "mathvista_official_ignore_empty"
_LMMS: Final = "lmms_eval"
_REPOSITORY: Final = (
    "lupantech/MathVista@53d525874bdde205128e6b160b7357a88277d479 evaluation/calculate_score.py"
)
_BRACKETED: Final = re.compile(r"\(([a-zA-Z])\)")
_NO_ANSWER: Final = "None"
_KINDS: Final = {
    "question_type": "multi_choice or free_form",
    "answer_type": "text, integer, float or list",
    "language": "of the question",
    "source": "the data set that the question is from",
    "category": "math-targeted-vqa or general-vqa",
    "task": "such as geometry problem solving",
    "context": "the kind of picture",
    "grade": "the school grade",
    "skills": "a list of abilities",
}


@SCORERS.register("mathvista")
class MathVistaScorer(Scorer):
    """1 or 0. ``answer`` is what was extracted from the model's text; ``gold``: the text to be met.

    Multiple choice: the first letter in round brackets, else the whole text if it is the capital letter of an
    option, else the option at the least edit distance, the first of several. So empty text is the shortest
    option and may be right, unless empty extractions are ignored; ``b`` is no letter and ``(b)`` is. integer:
    what Python's ``float`` reads, truncated (``3.9`` is 3); float: rounded to ``precision`` digits; list: the
    text as it is. Where the rule cannot work (options that are missing, another ``answer_type``) there is no
    value. MGM and lmms-eval round with ``precision`` as it comes: if it is 1.0 and not 1, nothing is ever
    right; lmms-eval strips both sides before it compares them, and theirs take any ``answer_type`` as text.
    """

    protocols: ClassVar = {
        _OFFICIAL: Protocol(_REPOSITORY),
        _IGNORE_EMPTY: Protocol(f"{_REPOSITORY} --ignore_empty_extractions"),
        "mgm": Protocol(
            "dvlab-research/MGM@769820cb71afc7c2b9a2166ca3ce92db1636215c "
            "mgm/eval/MathVista/calculate_score.py"
        ),
        _LMMS: Protocol(
            "EvolvingLMMs-Lab/lmms-eval@75571cfe0fa36ca5ec2e6aa2bb268f9d38295af3 "
            "lmms_eval/tasks/mathvista/mathvista_evals.py"
        ),
    }
    fields: ClassVar = {name: _KINDS[name] for name in ("question_type", "answer_type")}
    optional: ClassVar = {
        "choices": "the options of multiple choice",
        "precision": "digits of a float",
        **{name: what for name, what in _KINDS.items() if name not in {"question_type", "answer_type"}},
    }

    def judge(self, rows: Sequence[Row], protocol: str) -> list[Judged]:
        """Each row on its own."""
        return [_judge(row, protocol) for row in rows]

    def summarise(self, rows: Sequence[Row], judged: Sequence[Judged], protocol: str) -> Summary:
        """Shares of 1 over all questions, and by what is known of them; no value counts as wrong."""
        scored = [(row, each.value or 0.0) for row, each in zip(rows, judged, strict=True)]
        summary: dict[str, float | Summary] = {"average": mean([value for _, value in scored])}
        for field in _KINDS:
            groups = grouped((name, value) for row, value in scored for name in _names(row.fields.get(field)))
            if groups:
                summary[field] = {name: mean(values) for name, values in groups.items()}
        return summary


def _names(value: Json) -> list[str]:
    if value is None:
        return []
    return [str(each) for each in value] if isinstance(value, list) else [str(value)]


def _judge(row: Row, protocol: str) -> Judged:
    if row.answer is None:
        return UNANSWERED
    official = protocol in {_OFFICIAL, _IGNORE_EMPTY}
    if text_of(row, "question_type") == "multi_choice":
        said = _option(row.answer.strip(), row.fields.get("choices"), ignore_empty=protocol == _IGNORE_EMPTY)
    else:
        said = _free(row.answer, text_of(row, "answer_type"), row.fields.get("precision"), strict=official)
    if isinstance(said, _Impossible):
        return Judged(None, state="unparsed")
    if protocol == _LMMS:
        right = (_NO_ANSWER if said is None else said).strip() == str(row.gold).strip()
    else:
        right = said is not None and said == row.gold
    return Judged(float(right), said or "", "unparsed" if said is None else "read")


class _Impossible:
    """The official function raises."""


def _option(answer: str, choices: Json, *, ignore_empty: bool) -> str | _Impossible | None:
    if ignore_empty and not answer:
        return None
    if not isinstance(choices, list) or not choices or not all(isinstance(each, str) for each in choices):
        return _Impossible()
    options = lettered(choices)
    letter = found[1].upper() if (found := _BRACKETED.search(answer)) else answer
    if letter in options:
        return options[letter]
    return min(options.values(), key=lambda option: edit_distance(letter, option))


def _free(answer: str, kind: str, precision: Json, *, strict: bool) -> str | _Impossible | None:
    try:
        if kind == "integer":
            return str(int(float(answer)))
        if kind == "float":
            return _rounded(float(answer), precision, strict=strict)
    except (ValueError, OverflowError):
        return None
    return answer if kind == "list" or not strict else _Impossible()


def _rounded(number: float, precision: Json, *, strict: bool) -> str | None:
    """``strict`` makes a whole number of the precision, as the official script does.

    Without it, no precision rounds to a whole number, and one such as 1.0 is an error.
    """
    if precision is None and not strict:
        return str(round(number))
    if strict and isinstance(precision, str | float):
        precision = int(precision)
    return str(round(number, precision)) if isinstance(precision, int) else None
