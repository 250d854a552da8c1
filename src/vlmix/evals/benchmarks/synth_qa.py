"""Procedural scenes, small text and charts: short answers, judged by exact match."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, Self

from pydantic import Field, model_validator

from vlmix.core.errors import InputError
from vlmix.core.interfaces import Benchmark
from vlmix.core.parts import BENCHMARKS
from vlmix.core.sample import Answer, Sample, Score
from vlmix.core.settings import PartSettings
from vlmix.data.sources.synth import Synth, SynthSettings
from vlmix.evals.controls import targets_of

HELD_OUT_SEED: Final = 10_000_019
QuestionTask = Literal[
    "count",
    "colour",
    "shape",
    "relation",
    "existence",
    "text_digits",
    "text_words",
    "chart_bars",
    "chart_lines",
]
SMALL_TEXT: Final[frozenset[str]] = frozenset({"text_digits", "text_words"})


class SynthQaSettings(PartSettings):
    """Which questions are painted; the keys mean what they mean for the data source ``synth``.

    The default ``seed`` is kept for judging: train with any other.
    """

    kind: Literal["synth_qa"] = "synth_qa"  # pyright: ignore[reportIncompatibleVariableOverride]
    size: int = Field(default=1000, ge=1)
    seed: int = Field(default=HELD_OUT_SEED, ge=0)
    tasks: tuple[QuestionTask, ...] = (
        "count",
        "colour",
        "shape",
        "relation",
        "existence",
        "text_digits",
        "text_words",
        "chart_bars",
        "chart_lines",
    )
    image_size: int = Field(default=64, ge=48, le=2048)
    difficulty: float = Field(default=0.25, ge=0, le=1)
    text_height: int | None = Field(default=None, ge=5)
    noise: int = Field(default=6, ge=0, le=64)

    @classmethod
    def tiny(cls) -> Self:
        """Two questions of each task."""
        return cls(size=18)

    @model_validator(mode="after")
    def _can_be_painted(self) -> Self:
        self.source()
        return self

    def source(self) -> SynthSettings:
        """The settings of the data source that paints the questions."""
        return SynthSettings(**self.model_dump(exclude={"kind"}), split="test")


def normalised(text: str) -> str:
    """The text as it is compared: no case, no blanks around it, no full stop at its end."""
    return text.strip().removesuffix(".").strip().casefold()


@BENCHMARKS.register("synth_qa")
class SynthQa(Benchmark):
    """Each question counts the same: ``accuracy`` over all, ``small_text`` over the reading tasks alone."""

    settings_class = SynthQaSettings
    settings: SynthQaSettings
    headline = "accuracy"

    def samples(self) -> Sequence[Sample]:
        """Paint every question; the tasks take turns."""
        return list(Synth(self.settings.source()))

    def score(self, sample: Sample, answer: Answer) -> Score:
        """1 if the normalised answer equals a normalised target, else 0."""
        parsed = normalised(answer.text)
        right = not answer.error and parsed in {normalised(target) for target in targets_of(sample)}
        return Score(sample.id, float(right), parsed, sample.task, sample.group)

    def summarise(self, scores: Sequence[Score]) -> Mapping[str, float]:
        """Mean over questions; ``small_text`` is left out where none was asked.

        Raises:
            InputError: if there is no score.

        """
        if not scores:
            raise InputError("synth_qa: there is no score to sum up")
        reading = [score.value for score in scores if score.task in SMALL_TEXT]
        figures = {"accuracy": math.fsum(score.value for score in scores) / len(scores)}
        return {**figures, "small_text": math.fsum(reading) / len(reading)} if reading else figures

    @classmethod
    def tiny(cls, folder: Path) -> Self:
        """Two questions of each task; no file is needed."""
        del folder
        return cls(SynthQaSettings.tiny())
