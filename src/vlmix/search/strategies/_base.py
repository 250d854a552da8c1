"""What a strategy owes: rounds of choices, each seeing what was found before, and the best in the end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from vlmix.core.errors import RecipeError
from vlmix.core.settings import PartSettings
from vlmix.search.points import Point, Space


@dataclass(frozen=True, slots=True)
class Round:
    """Choices that are tried before the strategy goes on; ``title`` says what they are tried for."""

    title: str
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Gain:
    """What one choice has over another, in units of the objective, with its 95 % interval if there is one.

    ``enough`` is the verdict under the grid's stop rule, and ``why`` its reason in words.
    """

    value: float
    low: float | None
    high: float | None
    enough: bool
    why: str


@dataclass(frozen=True, slots=True)
class Step:
    """One decision of the path: ``point`` beside what it was compared with, and whether it was taken."""

    point: Point
    over: Point | None
    gain: Gain | None
    taken: bool


@dataclass(frozen=True, slots=True)
class Found:
    """Where a strategy ended, and how it got there; ``notes`` are sentences for the report."""

    best: Point
    path: tuple[Step, ...]
    notes: tuple[str, ...] = ()


class Findings(Protocol):
    """What the trials so far say."""

    @property
    def stops(self) -> bool:
        """Whether an addition that brings too little ends a search that grows mixtures."""
        ...

    def value(self, point: Point) -> float:
        """The objective of a choice that was tried; minus infinity if its trials failed."""
        ...

    def gain(self, point: Point, over: Point) -> Gain:
        """What ``point`` has over ``over``."""
        ...


Rounds = Generator[Round, None, Found]


class Strategy(ABC):
    """A way through a space, built from its settings. It trains nothing: it yields rounds and is told."""

    settings_class: ClassVar[type[PartSettings]]

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    @abstractmethod
    def check(self, space: Space) -> None:
        """Refuse a space that this strategy cannot search.

        Raises:
            RecipeError: with the remedy.
            UnknownNameError: if the settings name an encoder that the pool lacks.

        """

    @abstractmethod
    def most(self, space: Space) -> int:
        """The largest number of choices it may try there."""

    @abstractmethod
    def rounds(self, space: Space, findings: Findings) -> Rounds:
        """Yield rounds; when one comes back, ``findings`` knows its choices."""


def need_pool(kind: str, space: Space, least: int = 2) -> None:
    """Refuse a space without a pool of encoders, or with axes, which strategies over encoders leave alone.

    Raises:
        RecipeError: with the remedy.

    """
    if len(space.pool) < least:
        raise RecipeError(f"strategy {kind}: name at least {least} encoders under `encoders`")
    if space.axes or space.mixtures:
        raise RecipeError(
            f"strategy {kind}: it chooses encoders and leaves axes alone; remove `axes`, or take the "
            "strategy grid or optuna"
        )


def best_of(points: Sequence[Point], findings: Findings) -> Point:
    """The choice with the largest objective; of equal ones the first."""
    return max(points, key=findings.value)
