"""Every combination of the values of all axes."""

from __future__ import annotations

from itertools import product
from typing import Literal, Self

from vlmix.core.errors import RecipeError
from vlmix.core.settings import PartSettings
from vlmix.search.points import Point, Space
from vlmix.search.settings import RangeSettings
from vlmix.search.strategies import STRATEGIES
from vlmix.search.strategies._base import Findings, Found, Round, Rounds, Step, Strategy, best_of


class GridSettings(PartSettings):
    """The strategy has no settings."""

    kind: Literal["grid"] = "grid"  # pyright: ignore[reportIncompatibleVariableOverride]

    @classmethod
    def tiny(cls) -> Self:
        """As it is."""
        return cls()


@STRATEGIES.register("grid")
class PlainGrid(Strategy):
    """The product of the axes; without the axis ``encoders`` the whole pool sees."""

    settings_class = GridSettings

    def check(self, space: Space) -> None:
        """Refuse a space that cannot be searched so."""
        if not space.axes and not space.mixtures:
            raise RecipeError("strategy grid: name at least one axis with its values under `axes`")
        for key, values in space.axes.items():
            if isinstance(values, RangeSettings):
                raise RecipeError(
                    f"axes.{key}: a range has no list of values; write them out, or take the strategy optuna"
                )

    def most(self, space: Space) -> int:
        """How many choices that may be."""
        return len(_points(space))

    def rounds(self, space: Space, findings: Findings) -> Rounds:
        """Yield the rounds; end with the best."""
        points = _points(space)
        yield Round("every combination", points)
        best = best_of(points, findings)
        others = (Step(p, best, findings.gain(p, best), taken=False) for p in points if p != best)
        return Found(best, (Step(best, None, None, taken=True), *others))


def _points(space: Space) -> tuple[Point, ...]:
    lists = [values for values in space.axes.values() if not isinstance(values, RangeSettings)]
    return tuple(
        space.point(names, dict(zip(space.axes, values, strict=True)))
        for names in space.mixtures or (space.pool,)
        for values in product(*lists)
    )
