"""Channel concatenation (Eagle): bring every map to one grid and stack the channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import torch
from pydantic import PositiveInt
from torch import nn

from vlmix.core.errors import PlanError
from vlmix.core.interfaces import LateFusion
from vlmix.core.parts import FUSIONS
from vlmix.core.settings import PartSettings
from vlmix.core.tensors import FeatureMap, Resampling, TextContext, VisionSpec


class ChannelConcatSettings(PartSettings):
    """``grid`` (rows, columns) is the first encoder's unless given.

    ``resampling`` is how maps get there (Eagle's is ``bilinear_corners``); ``norm`` puts a LayerNorm on each
    encoder's channels first, so that none drowns the others.
    """

    kind: Literal["channel_concat"] = "channel_concat"  # pyright: ignore[reportIncompatibleVariableOverride]
    grid: tuple[PositiveInt, PositiveInt] | None = None
    resampling: Resampling = "bilinear"
    norm: bool = False

    @classmethod
    def tiny(cls) -> Self:
        """A grid of its own, and norms."""
        return cls(grid=(2, 2), norm=True)


@FUSIONS.register("channel_concat")
class ChannelConcat(LateFusion):
    """As many tokens as the grid has cells, however many encoders there are."""

    settings_class = ChannelConcatSettings

    def __init__(self, settings: ChannelConcatSettings, specs: Sequence[VisionSpec]) -> None:
        super().__init__()
        self.grid = self.plan(settings, specs).grid
        self.resampling: Resampling = settings.resampling
        self.norms = nn.ModuleList(
            nn.LayerNorm(spec.channels) if settings.norm else nn.Identity() for spec in specs
        )

    @classmethod
    def plan(cls, settings: ChannelConcatSettings, specs: Sequence[VisionSpec]) -> VisionSpec:
        """The grid with the channels of all encoders.

        Raises:
            PlanError: if there is no encoder.

        """
        if not specs:
            raise PlanError("channel_concat: there is no encoder; name at least one")
        return VisionSpec(settings.grid or specs[0].grid, sum(spec.channels for spec in specs))

    def merge(self, maps: Sequence[FeatureMap], context: TextContext | None = None) -> FeatureMap:
        """Norm, resample, stack."""
        stacked = [
            FeatureMap(norm(m.tokens), m.grid).resampled(self.grid, self.resampling).tokens
            for norm, m in zip(self.norms, maps, strict=True)
        ]
        return FeatureMap(torch.cat(stacked, dim=-1), self.grid)
