"""Grow a mixture: try every encoder that is left, keep the best, until none brings enough.

Eagle's round robin (Shi et al., arXiv:2408.15998): with six encoders and no stop rule it trains 5 + 4 + 3 + 2
+ 1 mixtures beside its start. With a stop rule it ends where the best addition brings too little.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt

from vlmix.core.settings import PartSettings
from vlmix.search.points import Point, Space
from vlmix.search.strategies import STRATEGIES
from vlmix.search.strategies._base import Findings, Found, Round, Rounds, Step, Strategy, best_of, need_pool


class RoundRobinSettings(PartSettings):
    """It grows from ``start``, the pool's first encoder unless given; ``most`` encoders are enough."""

    kind: Literal["round_robin"] = "round_robin"  # pyright: ignore[reportIncompatibleVariableOverride]
    start: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    most: PositiveInt | None = None

    @classmethod
    def tiny(cls) -> Self:
        """From the first encoder to all of them."""
        return cls()


@STRATEGIES.register("round_robin")
class RoundRobin(Strategy):
    """Forward greedy selection."""

    settings_class = RoundRobinSettings
    settings: RoundRobinSettings

    def check(self, space: Space) -> None:
        """Refuse a space that cannot be searched so."""
        need_pool("round_robin", space)
        self._start(space)

    def most(self, space: Space) -> int:
        """How many choices that may be."""
        first = len(self._start(space).encoders)
        last = min(self.settings.most or len(space.pool), len(space.pool))
        return 1 + sum(len(space.pool) - size for size in range(first, last))

    def rounds(self, space: Space, findings: Findings) -> Rounds:
        """Yield the rounds; end with the best."""
        current = self._start(space)
        path, chosen = [Step(current, None, None, taken=True)], [current]
        yield Round(f"start: {current.label}", (current,))
        while len(current.encoders) < min(self.settings.most or len(space.pool), len(space.pool)):
            left = [name for name in space.pool if name not in current.encoders]
            points = tuple(space.point((*current.encoders, name)) for name in left)
            yield Round(f"add one of {', '.join(left)} to {current.label}", points)
            best = best_of(points, findings)
            gain = findings.gain(best, current)
            taken = gain.enough or not findings.stops
            path += [Step(point, current, findings.gain(point, current), taken=False)
                     for point in points if point != best]  # fmt: skip
            path.append(Step(best, current, gain, taken))
            if not taken:
                note = f"Stopped at {current.label}: the best addition is {best.label}, and {gain.why}."
                return Found(current, tuple(path), (note,))
            current = best
            chosen.append(best)
        if findings.stops:
            return Found(current, tuple(path))
        note = "There is no stop rule: the best of the path is chosen."
        return Found(best_of(chosen, findings), tuple(path), (note,))

    def _start(self, space: Space) -> Point:
        return space.point(self.settings.start or space.pool[:1])
