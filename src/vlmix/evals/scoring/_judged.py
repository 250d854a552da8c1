"""Rules under which a judging model marks the answers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

from vlmix.core.errors import InputError
from vlmix.core.scoring import Judged, Row, Scorer
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
            free = ", ".join(name for name in self.protocols if name not in self.marked)
            raise InputError(
                f"protocol {protocol!r} needs a judging model. Name a server or a cassette, or take one that "
                f"needs none: {free}"
            )
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
