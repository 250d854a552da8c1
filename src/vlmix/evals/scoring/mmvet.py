"""MM-Vet: open questions that need several skills; a judging model marks answers from 0 to 1."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, Final, Self

from vlmix.core.parts import SCORERS
from vlmix.core.sample import Json, Judged, Row
from vlmix.core.scoring import Protocol, Summary
from vlmix.evals.judges.asking import Judge, Mark, Question
from vlmix.evals.scoring._fields import text_of, value_of
from vlmix.evals.scoring._judged import Figures, JudgedScorer, failed, words_of
from vlmix.evals.scoring._tally import UNANSWERED, grouped, mean, texts

_GPT4: Final = "gpt4"
_ELEMENTS: Final = "elements"
_WORD: Final = re.compile(r"-?\d+(?:[.,]\d+)*|[^\W\d_]+")
_RETRIES: Final = (0.0, 0.5, 1.0, 1.5)
_TOKENS: Final = 3
PROMPT: Final = """\
You mark answers to questions about pictures. Each line of the table below has a question, what is right, an \
answer and its mark. Parts of what is right that <AND> joins must all be in the answer for the full mark; of \
those that <OR> joins, one will do. A mark is 0.0 for an answer that is wrong altogether, 1.0 for one that \
is right altogether, and 0.1, 0.2 and so on in between. Fill in the mark that is missing, and nothing else.

Question | What is right | Answer | Mark
--- | --- | --- | ---
Which fruit is on the plate? | apple <AND> pear | There is one banana. | 0.0
Which fruit is on the plate? | apple <AND> pear | I see an apple. | 0.5
Which fruit is on the plate? | apple <AND> pear | A pear and an apple. | 1.0
How late is it? | 9:50 <OR> ten to ten | It is ten to ten. | 1.0
"""


@SCORERS.register("mmvet")
class MMVetScorer(JudgedScorer):
    """A share of 1. ``gold``: a text, whose parts ``<AND>`` and ``<OR>`` join.

    The judge fills the last cell of a table, in three tokens at temperature 0. What stands before its first
    blank must be a number from 0 to 1; else it is asked four times more, in plainer words and ever warmer, as
    the official script does it, and then the answer has failed. The script's own prompt is not part of this
    package: give it as ``prompt``, or in a file of rules, for its exact protocol; the one here has the same
    scale and form.

    ``elements`` needs no judge: the share of the parts joined by ``<AND>`` whose words stand side by side in
    the answer, of the best of those joined by ``<OR>``.
    """

    protocols: ClassVar = {
        _GPT4: Protocol("yuweihao/MM-Vet@7d717c2f54a584b7ed363d66e6481ce1bf648538 mm-vet_evaluator.py"),
        _ELEMENTS: Protocol("vlmix: parts of the gold answer that the answer holds"),
    }
    marked: ClassVar = frozenset({_GPT4})
    fields: ClassVar = {
        "question": "what was asked",
        "capability": "the skills it needs: a list, or text with commas",
    }
    units: ClassVar = {"capability_percent": "%", "integration_percent": "%", "total_percent": "%"}

    def __init__(self, judge: Judge | None = None, prompt: str = PROMPT) -> None:
        super().__init__(judge)
        self._prompt = prompt

    @classmethod
    def asking(cls, judge: Judge | None, rules: Path | None = None) -> Self:
        """``rules`` holds the prompt up to the line in question."""
        return cls(judge) if rules is None else cls(judge, words_of(rules))

    def attempts(self, row: Row) -> Sequence[Question]:
        """The table's last line, then the same with a plain request below it."""
        gold = " <OR> ".join(texts(row.gold)).replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        table = self._prompt + "\n" + " | ".join([text_of(row, "question"), gold, row.answer or "", ""])
        plainer = table + "\nThe mark, as a number: "
        again = [Question(plainer, temperature=each, max_tokens=_TOKENS) for each in _RETRIES]
        return [Question(table, max_tokens=_TOKENS), *again]

    def reader(self) -> Callable[[str], Figures | None]:
        """A number from 0 to 1 before the first blank."""
        return _share

    def marked_as(self, mark: Mark) -> Judged:
        """The mark."""
        return failed(mark) if mark.figures is None else Judged(mark.figures[0], mark.reply)

    def compare(self, row: Row) -> Judged:
        """The share of the parts that the answer holds."""
        if row.answer is None:
            return UNANSWERED
        words = _words(row.answer)
        ways = [way for gold in texts(row.gold) for way in gold.split("<OR>")]
        return Judged(
            max(mean([float(_words(part) in words) for part in way.split("<AND>")]) for way in ways),
            words.strip(),
        )

    def summarise(self, rows: Sequence[Row], judged: Sequence[Judged], protocol: str) -> Summary:
        """Percent by skill, by the set of skills a question needs, and of all, with one decimal."""
        pairs = [(_skills(row), each.value or 0.0) for row, each in zip(rows, judged, strict=True)]
        skills = grouped((skill, value) for some, value in pairs for skill in some)
        sets = grouped(("_".join(some), value) for some, value in pairs)
        return {
            "capability_percent": {name: round(100 * mean(values), 1) for name, values in skills.items()},
            "integration_percent": {name: round(100 * mean(values), 1) for name, values in sets.items()},
            "total_percent": round(100 * mean([value for _, value in pairs]), 1),
        }


def _share(reply: str) -> Figures | None:
    try:
        number = float(reply.split(" ")[0].strip())
    except ValueError:
        return None
    return (number,) if 0 <= number <= 1 else None


def _words(text: str) -> str:
    """The words in lower case, each between blanks, so that whole ones are found."""
    return f" {' '.join(_WORD.findall(text.lower()))} "


def _skills(row: Row) -> list[str]:
    raw: Json = value_of(row, "capability")
    return sorted({skill.strip() for some in texts(raw) for skill in some.split(",")})
