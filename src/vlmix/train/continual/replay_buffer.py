"""A memory of fixed size over everything trained on so far, mixed into the next task at a fixed ratio."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt

from vlmix.core.settings import PartSettings
from vlmix.train.continual import CONTINUAL
from vlmix.train.continual._base import Memory, Method, Past
from vlmix.train.continual._memory import Chosen, reservoir

_ROWS = 8


class ReplayBufferSettings(PartSettings):
    """At most ``size`` samples are held; they are ``ratio`` of what a later task draws."""

    kind: Literal["replay_buffer"] = "replay_buffer"  # pyright: ignore[reportIncompatibleVariableOverride]
    size: PositiveInt = 1000
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.1

    @classmethod
    def tiny(cls) -> Self:
        """Three samples, one draw in four."""
        return cls(size=3, ratio=0.25)


@CONTINUAL.register("replay_buffer")
class ReplayBuffer(Method):
    """Reservoir replay, arXiv:1902.10486: every sample trained on so far is in the memory equally likely.

    Which samples those are follows from the seed and the order of data, so a run that goes on finds the same.
    """

    settings_class = ReplayBufferSettings
    settings: ReplayBufferSettings

    def extra(self, past: Sequence[Past], seed: int) -> list[Memory]:
        """One memory over all earlier tasks."""
        if not past:
            return []
        held = reservoir(_stream(past), self.settings.size, (seed, _ROWS))
        starts = [sum(len(task.sources) for task in past[:place]) for place in range(len(past))]
        sources = [source for task in past for source in task.sources]
        rows = [(starts[task] + source, row) for task, source, row in held]
        return [Memory("buffer", Chosen(sources, rows), self.settings.ratio)]


def _stream(past: Sequence[Past]) -> Iterator[tuple[int, int, int]]:
    """Every draw from the sources of earlier tasks in the order of training: task, source, row."""
    for place, task in enumerate(past):
        for drawn in task.drawn():
            yield place, drawn.source, drawn.row
