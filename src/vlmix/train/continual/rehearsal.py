"""A small random share of every earlier task is seen again, each row once an epoch like the task's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field

from vlmix.core.settings import PartSettings
from vlmix.train.continual import CONTINUAL
from vlmix.train.continual._base import Memory, Method, Past
from vlmix.train.continual._memory import Chosen, random_rows

_ROWS = 7  # so that these draws share no seed with the order of data


class RehearsalSettings(PartSettings):
    """``share`` of the rows of each earlier task; the same rows for the whole run."""

    kind: Literal["rehearsal"] = "rehearsal"  # pyright: ignore[reportIncompatibleVariableOverride]
    share: Annotated[float, Field(gt=0, le=1)] = 0.01

    @classmethod
    def tiny(cls) -> Self:
        """Nothing to shrink: at least one row is seen again."""
        return cls()


@CONTINUAL.register("rehearsal")
class Rehearsal(Method):
    """Paper: arXiv:2410.19925, section 3.2. The language model's own text is no task to be rehearsed."""

    settings_class = RehearsalSettings
    settings: RehearsalSettings

    def extra(self, past: Sequence[Past], seed: int) -> list[Memory]:
        """A memory for each earlier task, drawn from the seed and the task's place."""
        return [
            Memory(task.task, Chosen(task.sources, self._rows(task, (seed, _ROWS, place))))
            for place, task in enumerate(past)
        ]

    def _rows(self, task: Past, key: tuple[int, ...]) -> list[tuple[int, int]]:
        return random_rows([len(source) for source in task.sources], self.settings.share, key)
