"""Every mixture of the pool, from so many to so many encoders."""

from __future__ import annotations

from itertools import combinations
from typing import Literal, Self

from pydantic import PositiveInt

from vlmix.core.errors import RecipeError
from vlmix.core.settings import PartSettings
from vlmix.search.points import Point, Space
from vlmix.search.strategies import STRATEGIES
from vlmix.search.strategies._base import Findings, Found, Round, Rounds, Step, Strategy, best_of, need_pool


class ExhaustiveSettings(PartSettings):
    """Mixtures of ``least`` to ``most`` encoders that hold all of ``always``."""

    kind: Literal["exhaustive"] = "exhaustive"  # pyright: ignore[reportIncompatibleVariableOverride]
    least: PositiveInt = 1
    most: PositiveInt | None = None
    always: tuple[str, ...] = ()

    @classmethod
    def tiny(cls) -> Self:
        """Every mixture."""
        return cls()


@STRATEGIES.register("exhaustive")
class Exhaustive(Strategy):
    """All subsets, the small ones first."""

    settings_class = ExhaustiveSettings
    settings: ExhaustiveSettings

    def check(self, space: Space) -> None:
        """Refuse a space that cannot be searched so."""
        need_pool("exhaustive", space, least=1)
        if not self._points(space):
            raise RecipeError(
                f"strategy exhaustive: no mixture of the pool's {len(space.pool)} encoders has "
                f"{self.settings.least} to {self.settings.most} of them with all of `always`"
            )

    def most(self, space: Space) -> int:
        """How many choices that may be."""
        return len(self._points(space))

    def rounds(self, space: Space, findings: Findings) -> Rounds:
        """Yield the rounds; end with the best."""
        points = self._points(space)
        for size in sorted({len(point.encoders) for point in points}):
            some = tuple(point for point in points if len(point.encoders) == size)
            yield Round(f"mixtures of {size}", some)
        best = best_of(points, findings)
        others = [point for point in points if point != best]
        path = (Step(best, None, None, taken=True),)
        return Found(best, (*path, *(Step(p, best, findings.gain(p, best), taken=False) for p in others)))

    def _points(self, space: Space) -> list[Point]:
        always = space.point(self.settings.always).encoders
        most = min(self.settings.most or len(space.pool), len(space.pool))
        return [
            space.point(names)
            for size in range(self.settings.least, most + 1)
            for names in combinations(space.pool, size)
            if {*always} <= {*names}
        ]
