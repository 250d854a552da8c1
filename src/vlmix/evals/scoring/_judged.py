"""Rules under which a judging model marks the answers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, Self

from vlmix.core.errors import InputError
from vlmix.core.sample import Judged, Row
from vlmix.core.scoring import Scorer
from vlmix.evals.judges.asking import Judge, Mark, Question, marks
from vlmix.evals.scoring._tally import UNANSWERED

Figures = tuple[float, ...]


class JudgedScorer(Scorer):
    """A rule whose protocols in ``marked`` need a judge; the others do without.

    An answer whose judge failed, or said nothing that is a mark, is ``failed``: it counts 0, and ``parsed``
    says what happened.
    """

    marked: ClassVar[frozenset[str]]

    def __init__(self, judge: Judge | None = None) -> None:
        self._judge = judge

    @classmethod
    @abstractmethod
    def asking(cls, judge: Judge | None, rules: Path | None = None) -> Self:
        """The rule with a judge, who is asked in the words of the file ``rules`` if there is one.

        Raises:
            InputError: if the file cannot be used.

        """

    def judge(self, rows: Sequence[Row], protocol: str) -> list[Judged]:
        """Each row on its own.

        Raises:
            InputError: if the protocol needs a judge and there is none.

        """
        if protocol not in self.marked:
            return [self.compare(row) for row in rows]
        answered = [row for row in rows if row.answer is not None]
        if not answered:
            return [UNANSWERED for _ in rows]
        if self._judge is None:
            raise InputError(judge_missing(type(self), protocol))
        found = iter(marks(self._judge, [self.attempts(row) for row in answered], self.reader()))
        return [UNANSWERED if row.answer is None else self.marked_as(next(found)) for row in rows]

    @abstractmethod
    def attempts(self, row: Row) -> Sequence[Question]:
        """What is asked about a row, and asked again as long as the reply is no mark."""

    @abstractmethod
    def reader(self) -> Callable[[str], Figures | None]:
        """What reads the marks in a reply; None where there are none."""

    @abstractmethod
    def marked_as(self, mark: Mark) -> Judged:
        """The judgement that a mark makes."""

    @abstractmethod
    def compare(self, row: Row) -> Judged:
        """The judgement without a judge."""


def failed(mark: Mark) -> Judged:
    """No mark: 0, with the reason."""
    return Judged(0.0, mark.failure, "failed")


def unjudged(rule: type[JudgedScorer]) -> str:
    """The first protocol that needs no judge."""
    return _free(rule)[0]


def judge_missing(rule: type[JudgedScorer], protocol: str) -> str:
    """Why a protocol cannot be followed without a judge, and what to do."""
    return (
        f"protocol {protocol!r} needs a judging model. Name a server or a cassette, or take one that "
        f"needs none: {', '.join(_free(rule))}"
    )


def without_judge(rule: type[JudgedScorer], protocol: str) -> str:
    """What to know of figures that no judge had a part in."""
    return (
        f"no judge is named, so the answers are scored by {protocol!r}, which needs none and is not the "
        f"published protocol, {rule.official()!r}: the figures are not those that papers print. Name a judge "
        "with --judge"
    )


def _free(rule: type[JudgedScorer]) -> list[str]:
    return [name for name in rule.protocols if name not in rule.marked]


def words_of(rules: Path) -> str:
    """The text of a file with words to a judge.

    Raises:
        InputError: if it cannot be read.

    """
    try:
        return rules.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{rules} cannot be read as text ({error})") from None
