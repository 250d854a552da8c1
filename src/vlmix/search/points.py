"""What a search can choose: encoders of a pool, and values for keys of the recipe. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmix.core.errors import UnknownNameError
from vlmix.search.settings import ENCODERS_AXIS, Grid, RangeSettings


@dataclass(frozen=True, slots=True)
class Point:
    """One choice: encoders in the pool's order (none: the recipe's own), and ``(key, value as JSON)``."""

    encoders: tuple[str, ...] = ()
    settings: tuple[tuple[str, str], ...] = ()

    @property
    def label(self) -> str:
        """How people read it: ``blur + detail, model.fusion.kind=…``."""
        parts = [" + ".join(self.encoders)] if self.encoders else []
        parts += [f"{key}={value}" for key, value in self.settings]
        return ", ".join(parts) or "the recipe as it is"

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "encoders": list(self.encoders),
            "settings": {key: json.loads(value) for key, value in self.settings},
        }


@dataclass(frozen=True, slots=True)
class Space:
    """All choices: the ``pool`` of encoders in order, and the other ``axes``.

    ``mixtures`` are those that the axis of encoders lists; ``width`` trials run at once.
    """

    pool: tuple[str, ...] = ()
    axes: Mapping[str, Sequence[Any] | RangeSettings] = field(default_factory=dict[str, Any])
    mixtures: tuple[tuple[str, ...], ...] = ()
    width: int = 1

    @staticmethod
    def of(grid: Grid, width: int = 1) -> Space:
        """The space of a grid."""
        axes = {key: values for key, values in grid.axes.items() if key != ENCODERS_AXIS}
        mixtures = tuple(tuple(names) for names in grid.mixtures())
        return Space(tuple(grid.encoders), axes, mixtures, width)

    def point(self, encoders: Iterable[str] = (), settings: Mapping[str, Any] | None = None) -> Point:
        """A choice; a set of encoders is one choice, whatever the order it was put together in.

        Raises:
            UnknownNameError: if the pool has no such encoder.

        """
        chosen = set(encoders)
        for name in sorted(chosen - {*self.pool}):
            raise UnknownNameError("encoder of the pool", name, self.pool)
        told = tuple((key, json.dumps(value, sort_keys=True)) for key, value in (settings or {}).items())
        return Point(tuple(name for name in self.pool if name in chosen), told)
