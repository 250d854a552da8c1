"""LLaVA-Bench (In-the-Wild): open questions; a judging model marks answers beside GPT-4's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Final, Self

from vlmix.core.errors import InputError
from vlmix.core.parts import SCORERS
from vlmix.core.sample import Judged, Row
from vlmix.core.scoring import Protocol, Summary
from vlmix.evals.judges.asking import Judge, Mark, Question
from vlmix.evals.scoring._captions import Captioned, rouge_l
from vlmix.evals.scoring._fields import text_of, value_of
from vlmix.evals.scoring._judged import Figures, JudgedScorer, failed, words_of
from vlmix.evals.scoring._ptb import tokenize
from vlmix.evals.scoring._tally import UNANSWERED, grouped, mean, texts

_GPT4: Final = "gpt4"
_ROUGE: Final = "rouge_l"
_SYSTEM: Final = "system"
_MOST: Final = 10.0
_TEMPERATURE: Final = 0.2
SYSTEM: Final = "You compare answers with care and mark them."
RULE: Final = """\
Two assistants answered the question above, which is about a picture; the context describes that picture. \
Mark both answers for how helpful, relevant, accurate and detailed they are, from 1 to 10, where 10 is best. \
Write the two marks on the first line, Assistant 1's first, with a blank between them and nothing else. From \
the second line on, give your reasons. The order of the answers must not matter."""


@SCORERS.register("llava_bench")
class LlavaBenchScorer(JudgedScorer):
    """Marks from 0 to 10, and those of all answers in percent of their references'. ``gold``: GPT-4's answer.

    The first line of the judge's reply must be two numbers with a blank or a comma between them, both from 0
    to 10; a blank too many spoils it. Else the answer has failed: it counts 0, and its reference's mark,
    which nobody knows, is left out of the references' mean. (LLaVA's script gives -1 to both.) The script's
    own instructions are not part of this package: give them as ``rules``, by category, as ``rule.json`` has
    them, and ``system``, for its exact protocol; those here ask for the same.

    ``rouge_l`` needs no judge: ROUGE-L with the reference, a share of 1.
    """

    protocols: ClassVar = {
        _GPT4: Protocol(
            "haotian-liu/LLaVA@181a2f811f1eb0b794c25e87204491d812c05f8d "
            "llava/eval/eval_gpt_review_bench.py and llava/eval/summarize_gpt_review.py",
            full=_MOST,
        ),
        _ROUGE: Protocol("vlmix: ROUGE-L with the reference answer"),
    }
    marked: ClassVar = frozenset({_GPT4})
    fields: ClassVar = {
        "question": "what was asked",
        "category": "conv, detail or complex",
        "caption": "the picture in words: a text or a list",
    }
    units: ClassVar = {"relative_percent": "%"}

    def __init__(
        self, judge: Judge | None = None, rules: Mapping[str, str] | None = None, system: str = SYSTEM
    ) -> None:
        super().__init__(judge)
        self._rules, self._system = rules or {}, system

    @classmethod
    def asking(cls, judge: Judge | None, rules: Path | None = None) -> Self:
        """``rules`` is LLaVA's ``rule.json``; a ``system`` beside its categories is the word to the judge."""
        if rules is None:
            return cls(judge)
        try:
            whole = json.loads(words_of(rules))
            words = {name: str(each["prompt"]) for name, each in whole.items() if name != _SYSTEM}
            return cls(judge, words, str(whole.get(_SYSTEM, SYSTEM)))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{rules} is no rule.json with a `prompt` for each category ({error!r})"
            ) from None

    def attempts(self, row: Row) -> Sequence[Question]:
        """Context, question, both answers, and the rule of the question's category."""
        rule = self._rules.get(f"llava_bench_{text_of(row, 'category')}", RULE)
        context = "\n".join(texts(value_of(row, "caption")))
        parts = [
            f"[Context]\n{context}",
            f"[Question]\n{text_of(row, 'question')}",
            f"[Assistant 1]\n{texts(row.gold)[0]}",
            "[End of Assistant 1]",
            f"[Assistant 2]\n{row.answer}",
            "[End of Assistant 2]",
            f"[System]\n{rule}",
        ]
        return [Question("\n\n".join(parts) + "\n\n", self._system, _TEMPERATURE)]

    def reader(self) -> Callable[[str], Figures | None]:
        """Two numbers on the first line."""
        return _pair

    def marked_as(self, mark: Mark) -> Judged:
        """The answer's mark, with its reference's beside it."""
        if mark.figures is None:
            return failed(mark)
        reference, answer = mark.figures
        return Judged(answer, mark.reply.split("\n")[0], detail={"reference": reference})

    def compare(self, row: Row) -> Judged:
        """ROUGE-L with the reference."""
        if row.answer is None:
            return UNANSWERED
        answer, *references = tokenize([row.answer, *texts(row.gold)])
        return Judged(rouge_l(Captioned(answer, references)), answer)

    def summarise(self, rows: Sequence[Row], judged: Sequence[Judged], protocol: str) -> Summary:
        """The answers' mean mark in percent of the references', by category and of all; or mean ROUGE-L."""
        kinds = grouped(
            (f"llava_bench_{text_of(row, 'category')}", each) for row, each in zip(rows, judged, strict=True)
        )
        groups = {"all": judged, **{kind: kinds[kind] for kind in sorted(kinds)}}
        if protocol == _ROUGE:
            return {name: mean([each.value or 0.0 for each in some]) for name, some in groups.items()}
        return {"relative_percent": {name: _relative(some) for name, some in groups.items()}}


def _relative(judged: Sequence[Judged]) -> float:
    """The means are rounded to three decimals before they are divided, as in the script."""
    references = [each.detail["reference"] for each in judged if "reference" in each.detail]
    answers, theirs = round(mean([each.value or 0.0 for each in judged]), 3), round(mean(references), 3)
    return round(100 * answers / theirs, 1) if theirs else 0.0


def _pair(reply: str) -> Figures | None:
    try:
        one, other = (float(number) for number in reply.split("\n")[0].replace(",", " ").split(" "))
    except ValueError:
        return None
    return (one, other) if 0 <= one <= _MOST and 0 <= other <= _MOST else None
