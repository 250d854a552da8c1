"""Procedural scenes of NLVR's kind with exact statements, counts and descriptions; nothing is read."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from random import Random
from typing import Literal, Self

from PIL import Image
from pydantic import Field

from vlmix.core.interfaces import Source
from vlmix.core.parts import SOURCES
from vlmix.core.sample import ImageRef, Sample, Turn
from vlmix.core.settings import PartSettings
from vlmix.data.boxes.balance import Balance
from vlmix.data.boxes.describe import DESCRIBE, count_question, describe
from vlmix.data.boxes.noise import as_typed
from vlmix.data.boxes.paint import paint_box, paint_scene
from vlmix.data.boxes.scene import Scene, draw_scene


class BoxesSettings(PartSettings):
    """How many scenes and what is asked about each; another ``seed`` is another set.

    A scene has ``turns`` questions, so that its pictures are seen once for all of them. A question is a
    count with the chance ``counts``, else a statement to judge; with the chance ``describe`` the last one
    asks for a description of all boxes. The share ``each`` of the counts asks for one number per box.
    ``towers`` is the share of scenes with towers, ``typo`` the chance of a slip in a statement. ``boxes``
    shows three pictures instead of one wide one. ``alone`` is the share of scenes with one box only, to
    learn to see from.
    """

    kind: Literal["boxes"] = "boxes"  # pyright: ignore[reportIncompatibleVariableOverride]
    size: int = Field(default=100_000, ge=1)
    seed: int = Field(default=0, ge=0)
    turns: int = Field(default=8, ge=1)
    counts: float = Field(default=0.1, ge=0, le=1)
    each: float = Field(default=0.0, ge=0, le=1)
    describe: float = Field(default=0.1, ge=0, le=1)
    towers: float = Field(default=0.6, ge=0, le=1)
    typo: float = Field(default=0.06, ge=0, le=1)
    boxes: bool = True
    alone: float = Field(default=0.0, ge=0, le=1)
    question: str = "{sentence}"

    @classmethod
    def tiny(cls) -> Self:
        """Six scenes with every kind of question."""
        return cls(size=6, turns=3, counts=0.4, each=0.5, describe=0.5, alone=0.3)


@SOURCES.register("boxes")
class Boxes(Source):
    """Conversations about scenes drawn when asked for: row ``i`` depends on the settings and ``i`` alone.

    Statements are chosen so that for every sentence both labels are equally likely: the sentence alone says
    nothing.
    """

    settings_class = BoxesSettings
    settings: BoxesSettings

    def __len__(self) -> int:
        """Scenes of the set; none is ever bad."""
        return self.settings.size

    def __getitem__(self, index: int) -> Sample:
        """Scene ``index`` and its conversation; the target is the last answer."""
        if not 0 <= index < self.settings.size:
            raise IndexError(f"row {index} of a set of {self.settings.size}")
        rng, name = Random(f"{self.settings.seed} {index}"), f"boxes-{self.settings.seed}-{index}"
        scene = draw_scene(rng, towers=rng.random() < self.settings.towers)
        if rng.random() < self.settings.alone:
            scene = Scene(scene.boxes[:1], scene.towers)
        turns = list[Turn]()
        for number, (question, answer) in enumerate(self._questions(rng, scene)):
            images = self._images(scene) if number == 0 else ()
            turns += [Turn("user", (*images, question)), Turn("assistant", (answer,))]
        task = "towers" if scene.towers else "scattered"
        return Sample(id=name, turns=tuple(turns), target=turns[-1].text, task=task, group=name)

    @classmethod
    def tiny(cls, folder: Path) -> BoxesSettings:
        """Six scenes; no file is needed."""
        del folder
        return BoxesSettings.tiny()

    @cached_property
    def _balance(self) -> Balance:
        return Balance()

    def _images(self, scene: Scene) -> tuple[ImageRef, ...]:
        apart = self.settings.boxes or len(scene.boxes) == 1
        pixels = [paint_box(box) for box in scene.boxes] if apart else [paint_scene(scene)]
        return tuple(ImageRef(Image.fromarray(one)) for one in pixels)

    def _questions(self, rng: Random, scene: Scene) -> list[tuple[str, str]]:
        settings = self.settings
        describes = rng.random() < settings.describe
        asked = [self._question(rng, scene) for _ in range(settings.turns - describes)]
        return [*asked, (DESCRIBE, describe(scene))] if describes else asked

    def _question(self, rng: Random, scene: Scene) -> tuple[str, str]:
        if rng.random() < self.settings.counts:
            each = len(scene.boxes) > 1 and rng.random() < self.settings.each
            return count_question(rng, scene, each)
        sentence, truth = self._balance.draw(rng, scene)
        typed = as_typed(rng, sentence, self.settings.typo)
        return self.settings.question.format(sentence=typed), "true" if truth else "false"
