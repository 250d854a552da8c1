"""Necessity: every encoder together, and then each of them left out and the rest trained anew.

Masking an encoder of a trained mixture ranks encoders otherwise than training without it (Beyond Encoder
Accumulation, arXiv:2606.03879), so nothing is masked here.
"""

from __future__ import annotations

from typing import Literal, Self

from vlmix.core.settings import PartSettings
from vlmix.search.points import Space
from vlmix.search.strategies import STRATEGIES
from vlmix.search.strategies._base import Findings, Found, Round, Rounds, Step, Strategy, best_of, need_pool


class LeaveOneOutSettings(PartSettings):
    """With ``again`` the encoder that is missed least is given up, and so on while the rest is no worse."""

    kind: Literal["leave_one_out"] = "leave_one_out"  # pyright: ignore[reportIncompatibleVariableOverride]
    again: bool = False

    @classmethod
    def tiny(cls) -> Self:
        """One round."""
        return cls()


@STRATEGIES.register("leave_one_out")
class LeaveOneOut(Strategy):
    """Backward: what each encoder is needed for."""

    settings_class = LeaveOneOutSettings
    settings: LeaveOneOutSettings

    def check(self, space: Space) -> None:
        """Refuse a space that cannot be searched so."""
        need_pool("leave_one_out", space)

    def most(self, space: Space) -> int:
        """How many choices that may be."""
        count = len(space.pool)
        return 1 + (sum(range(2, count + 1)) if self.settings.again else count)

    def rounds(self, space: Space, findings: Findings) -> Rounds:
        """Yield the rounds; end with the best."""
        current = space.point(space.pool)
        path, tried, notes = [Step(current, None, None, taken=True)], [current], list[str]()
        yield Round(f"all: {current.label}", (current,))
        while len(current.encoders) > 1:
            rest = {name: [other for other in current.encoders if other != name] for name in current.encoders}
            points = {name: space.point(names) for name, names in rest.items()}
            yield Round(f"leave one out of {current.label}", tuple(points.values()))
            tried += points.values()
            best = best_of(tuple(points.values()), findings)
            for name, point in points.items():
                # What the encoder brings: the mixture with it over the mixture without.
                gain = findings.gain(current, point)
                notes.append(f"{name} {'is needed' if gain.enough else 'is not needed'}: {gain.why}.")
                path.append(
                    Step(point, current, findings.gain(point, current), point == best and not gain.enough)
                )
            if findings.gain(current, best).enough or not self.settings.again:
                break
            current = best
        ended = current if self.settings.again else best_of(tried, findings)
        return Found(ended, tuple(path), tuple(notes))
