"""Rank encoders by what each does alone, then pair the best with every other.

The finding it follows: the best mixture is an encoder of high capacity with the one that complements it, and
two do about as well as five (Beyond Encoder Accumulation, arXiv:2606.03879).
"""

from __future__ import annotations

from typing import Literal, Self

from vlmix.core.settings import PartSettings
from vlmix.search.points import Space
from vlmix.search.strategies import STRATEGIES
from vlmix.search.strategies._base import Findings, Found, Round, Rounds, Step, Strategy, best_of, need_pool


class AnchorPlusComplementSettings(PartSettings):
    """The strategy has no settings."""

    kind: Literal["anchor_plus_complement"] = "anchor_plus_complement"  # pyright: ignore[reportIncompatibleVariableOverride]

    @classmethod
    def tiny(cls) -> Self:
        """As it is."""
        return cls()


@STRATEGIES.register("anchor_plus_complement")
class AnchorPlusComplement(Strategy):
    """Capacity first, complement second."""

    settings_class = AnchorPlusComplementSettings
    settings: AnchorPlusComplementSettings

    def check(self, space: Space) -> None:
        """Refuse a space that cannot be searched so."""
        need_pool("anchor_plus_complement", space)

    def most(self, space: Space) -> int:
        """How many choices that may be."""
        return 2 * len(space.pool) - 1

    def rounds(self, space: Space, findings: Findings) -> Rounds:
        """Yield the rounds; end with the best."""
        alone = tuple(space.point([name]) for name in space.pool)
        yield Round("each encoder alone", alone)
        anchor = best_of(alone, findings)
        ranked = sorted(alone, key=findings.value, reverse=True)
        order = ", ".join(f"{point.label} {findings.value(point):.4g}" for point in ranked)
        path = [Step(anchor, None, None, taken=True)]
        pairs = tuple(space.point((*anchor.encoders, *point.encoders)) for point in ranked[1:])
        yield Round(f"pairs with {anchor.label}", pairs)
        best = best_of(pairs, findings)
        path += [Step(p, anchor, findings.gain(p, anchor), taken=False) for p in pairs if p != best]
        gain = findings.gain(best, anchor)
        path.append(Step(best, anchor, gain, gain.enough))
        notes = (f"Capacity alone: {order}.", f"{best.label} over {anchor.label}: {gain.why}.")
        return Found(best if gain.enough else anchor, tuple(path), notes)
