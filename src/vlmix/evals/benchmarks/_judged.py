"""Benchmarks whose official protocol has a judging model mark the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self, cast

from pydantic import model_validator

from vlmix.core.parts import SCORERS
from vlmix.core.sample import Score
from vlmix.core.scoring import Scorer
from vlmix.evals.benchmarks._official import OfficialBenchmark
from vlmix.evals.benchmarks._stored import StoredSettings
from vlmix.evals.judges.settings import JudgeSettings
from vlmix.evals.scoring._judged import JudgedScorer, unjudged, without_judge

JUDGE_FAILED: Final = "judge_failed"
"""The share of answers that the judge gave no mark; each counts 0."""


class JudgedSettings(StoredSettings):
    """``judge`` marks the answers by the official protocol; without one a protocol is taken that needs none.

    ``rules`` is a file with the words that the judge is asked with, where they are not to be this package's.
    """

    judge: JudgeSettings | None = None
    rules: Path | None = None

    @model_validator(mode="after")
    def _has_a_judge_where_one_is_needed(self) -> Self:
        marked = self.scorer_class().marked
        if self.judge is None and self.protocol in marked:
            raise ValueError(
                f"protocol {self.protocol!r} needs a judge: name its server or cassette under `judge`"
            )
        if self.judge is not None and self.protocol and self.protocol not in marked:
            raise ValueError(f"protocol {self.protocol!r} needs no judge; leave out `judge` or `protocol`")
        if self.rules is not None and self.judge is None:
            raise ValueError("`rules` are words to a judge, and there is none")
        return self

    @classmethod
    def scorer_class(cls) -> type[JudgedScorer]:
        """The scoring rule."""
        return cast("type[JudgedScorer]", SCORERS.get(cls.rule))


class JudgedBenchmark(OfficialBenchmark):
    """Marked by the judge of the settings. The controls are marked as well: a question costs several marks.

    An answer that the judge gives no mark counts 0, its ``parsed`` says why, and ``judge_failed`` is the
    share of such answers.
    """

    settings: Any

    def __init__(self, settings: JudgedSettings) -> None:
        super().__init__(settings)
        if settings.judge is None:
            self.note = f"{settings.kind}: {without_judge(settings.scorer_class(), self.protocol)}"

    def scorer(self) -> Scorer:
        """The rule with its judge.

        Raises:
            InputError: if the cassette or the file of rules cannot be used.

        """
        judge, rules = self.settings.judge, self.settings.rules
        return self.settings.scorer_class().asking(judge.judge() if judge else None, rules)

    def usual_protocol(self) -> str:
        """The official one, or without a judge the first that needs none."""
        rule = self.settings.scorer_class()
        return unjudged(rule) if self.settings.judge is None else rule.official()

    def summarise(self, scores: Sequence[Score]) -> Mapping[str, float]:
        """The rule's figures, and how many answers the judge failed on."""
        figures = super().summarise(scores)
        if self.protocol not in self.settings.scorer_class().marked or not scores:
            return figures
        failed = sum(
            score.state == "failed" and bool(score.row and score.row.answer is not None) for score in scores
        )
        return {**figures, JUDGE_FAILED: failed / len(scores)}
