"""Procedural scenes, small text, charts and captions with exact answers, a seed and a difficulty dial."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal, Self, get_args

import numpy as np
from numpy.random import Generator
from PIL import Image
from pydantic import Field, model_validator

from vlmix.core.interfaces import Source
from vlmix.core.parts import SOURCES
from vlmix.core.sample import ImageRef, Json, Sample, Turn
from vlmix.core.settings import PartSettings
from vlmix.data.synth import captions, charts, scenes, text
from vlmix.data.synth.drawing import COLOURS, SHAPES, Dial, Item
from vlmix.data.synth.fonts import LARGE_HEIGHT, SMALL_HEIGHT, text_width

Task = Literal[
    "count",
    "colour",
    "shape",
    "relation",
    "existence",
    "text_digits",
    "text_words",
    "chart_bars",
    "chart_lines",
    "caption",
    "mosaic",
    "page",
]
TASKS: Final[tuple[Task, ...]] = get_args(Task)
TEACHING_TASKS: Final[frozenset[Task]] = frozenset({"caption", "mosaic", "page"})
QUESTION_TASKS: Final[tuple[Task, ...]] = tuple(task for task in TASKS if task not in TEACHING_TASKS)

_PAINTERS: Final[Mapping[Task, Callable[[Generator, Dial], Item]]] = MappingProxyType(
    {
        "count": scenes.count,
        "colour": scenes.colour,
        "shape": scenes.shape,
        "relation": scenes.relation,
        "existence": scenes.existence,
        "text_digits": text.digits,
        "text_words": text.words,
        "chart_bars": charts.bars,
        "chart_lines": charts.lines,
        "caption": captions.caption,
        "mosaic": captions.mosaic,
        "page": captions.page,
    }
)


class SynthSettings(PartSettings):
    """How many pictures of which tasks; another ``seed`` is another set, which makes a held-out one.

    ``tasks`` take turns, so each has the same number of rows. ``difficulty`` (0..1) sets how many things
    and distractors, how long and how small the text, how many bars. ``text_height`` (pixels, a multiple of
    5 or 7) overrides the size of the text, ``noise`` is the largest change of a pixel in grey levels: text
    of 5 pixels needs 32 or more before a view of a quarter of the side can no longer guess it from the blur.
    ``answer`` is the bare answer or a sentence around it. ``split`` only labels the samples.
    """

    kind: Literal["synth"] = "synth"  # pyright: ignore[reportIncompatibleVariableOverride]
    size: int = Field(default=1000, ge=1)
    seed: int = Field(default=0, ge=0)
    split: str = "train"
    tasks: tuple[Task, ...] = TASKS
    image_size: int = Field(default=64, ge=48, le=2048)
    difficulty: float = Field(default=0.25, ge=0, le=1)
    text_height: int | None = Field(default=None, ge=SMALL_HEIGHT)
    noise: int = Field(default=6, ge=0, le=64)
    answer: Literal["short", "sentence"] = "short"

    @classmethod
    def tiny(cls) -> Self:
        """Two rounds of all tasks."""
        return cls(size=2 * len(TASKS))

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError("tasks: name at least one task, and none twice")
        height, longest = self.dial().text_height, text.MAX_LENGTH
        if text_width(longest, height) + 2 > self.image_size:
            raise ValueError(
                f"text_height: {longest} glyphs of {height} pixels do not fit a picture of {self.image_size}"
            )
        return self

    def dial(self) -> Dial:
        """What the painters need, the text's height included: 7 pixels on a picture of 64, 5 when hard."""
        design = LARGE_HEIGHT if self.difficulty < 0.5 else SMALL_HEIGHT
        height = self.text_height or design * max(1, self.image_size // 64)
        return Dial(self.image_size, self.difficulty, height, self.noise)


@SOURCES.register("synth")
class Synth(Source):
    """Samples painted when asked for: row ``i`` depends on the settings and ``i`` alone."""

    settings_class = SynthSettings
    settings: SynthSettings

    def __len__(self) -> int:
        """Rows of the set; none is ever bad."""
        return self.settings.size

    def __getitem__(self, index: int) -> Sample:
        """Paint row ``index``: picture, then question; the target is the answer."""
        settings = self.settings
        if not 0 <= index < settings.size:
            raise IndexError(f"row {index} of a set of {settings.size}")
        task = settings.tasks[index % len(settings.tasks)]
        item = _PAINTERS[task](np.random.default_rng([settings.seed, index]), settings.dial())
        name = f"synth-{settings.seed}-{index}"
        answer = item.answer
        if settings.answer == "sentence" and task in QUESTION_TASKS:
            answer = f"The answer is {answer}."
        user = Turn("user", (ImageRef(Image.fromarray(item.pixels)), item.question))
        details: dict[str, Json] = {"split": settings.split, **item.details}
        return Sample(
            id=name,
            turns=(user, Turn("assistant", (answer,))),
            target=item.answer,
            task=task,
            group=name,
            meta=details,
        )

    @classmethod
    def tiny(cls, folder: Path) -> SynthSettings:
        """Two rounds of all tasks; no file is needed."""
        del folder
        return SynthSettings.tiny()


def answer_set(task: Task, settings: SynthSettings) -> tuple[str, ...]:
    """Every answer ``task`` can have, each about equally often; empty where the set is open.

    Where it is not empty, one over its length is what guessing scores.
    """
    dial = settings.dial()
    values = tuple(str(value) for value in range(1, charts.MAX_VALUE + 1))
    closed: dict[Task, tuple[str, ...]] = {
        "count": values[: scenes.max_count(dial)],
        "colour": tuple(COLOURS),
        "shape": SHAPES,
        "relation": ("yes", "no"),
        "existence": ("yes", "no"),
        "text_words": text.word_list(dial),
        "chart_bars": values,
        "chart_lines": values,
    }
    return closed.get(task, ())
