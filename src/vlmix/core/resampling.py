"""An encoder's map brought to another grid before anything fuses it."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import PositiveInt

from vlmix.core.errors import PlanError
from vlmix.core.settings import PartSettings, Settings, divided
from vlmix.core.tensors import FeatureMap, VisionSpec

_JOINS = ("token_major", "channel_major")


class ResampleSettings(Settings):
    """``grid`` (rows, columns) and how to get there.

    ``bilinear`` aligns the edges, ``bilinear_corners`` the corner samples; ``area`` averages; ``token_major``
    and ``channel_major`` lose nothing: neighbours become one token with all their channels, in that order.
    """

    grid: tuple[PositiveInt, PositiveInt]
    mode: Literal["bilinear", "bilinear_corners", "area", "token_major", "channel_major"] = "bilinear"

    def plan(self, spec: VisionSpec) -> VisionSpec:
        """What becomes of a map with this spec; its blocks can no longer be run one by one.

        Raises:
            PlanError: if neighbours are to be joined and the grid does not divide.

        """
        if self.mode not in _JOINS:
            return VisionSpec(self.grid, spec.channels)
        if any(ours % theirs for ours, theirs in zip(spec.grid, self.grid, strict=True)):
            raise PlanError(
                f"resample: a grid of {spec.grid} does not divide into {self.grid}, so neighbours cannot be "
                f"joined; take a grid that divides it, or `mode: bilinear`"
            )
        return VisionSpec(self.grid, spec.channels * (spec.tokens // math.prod(self.grid)))

    def apply(self, found: FeatureMap) -> FeatureMap:
        """Resample or join."""
        if self.mode == "token_major" or self.mode == "channel_major":  # noqa: PLR1714 - narrows the type
            return found.joined(self.grid, self.mode)
        return found.resampled(self.grid, self.mode)


class EncoderSettings(PartSettings):
    """Base of every encoder's settings.

    ``sees`` the views that the model's tiling makes of a picture, or the whole picture once; its map is then
    divided among the views.
    """

    resample: ResampleSettings | None = None
    sees: Literal["views", "picture"] = "views"

    def shrunk(self, factor: int) -> Self:
        """As for every part, with the resampled grid divided as well."""
        small = super().shrunk(factor)
        if self.resample is None:
            return small
        return small.changed(
            resample={"grid": divided(self.resample.grid, factor, "grid"), "mode": self.resample.mode}
        )
