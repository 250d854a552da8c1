"""Channel concatenation (Eagle): bring every map to one grid and stack the channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from vlmix.core.errors import PlanError
from vlmix.core.interfaces import LateFusion
from vlmix.core.parts import FUSIONS
from vlmix.core.settings import PartSettings
from vlmix.core.tensors import FeatureMap, Resampling, TextContext, VisionSpec


class ChannelConcatSettings(PartSettings):
    """``grid`` (rows, columns) is the first encoder's unless given.

    ``resampling`` is how maps get there (Eagle's is ``bilinear_corners``); ``norm`` puts a LayerNorm on each
    encoder's channels first, so that none drowns the others. In training each encoder is lost to each picture
    (or view of it) with probability ``encoder_dropout``, never all of them, so that the model can later do
    with fewer.
    """

    kind: Literal["channel_concat"] = "channel_concat"  # pyright: ignore[reportIncompatibleVariableOverride]
    grid: tuple[PositiveInt, PositiveInt] | None = None
    resampling: Resampling = "bilinear"
    norm: bool = False
    encoder_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    lengths: ClassVar[tuple[str, ...]] = ("grid",)

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
        self.encoder_dropout = settings.encoder_dropout
        self.norms = nn.ModuleList(
            nn.LayerNorm(spec.channels) if settings.norm else nn.Identity() for spec in specs
        )

    @classmethod
    def plan(cls, settings: ChannelConcatSettings, specs: Sequence[VisionSpec]) -> VisionSpec:
        """The grid with the channels of all encoders.

        Raises:
            PlanError: if there is no encoder, or tokens without a rectangle would be interpolated.

        """
        if not specs:
            raise PlanError("channel_concat: there is no encoder; name at least one")
        grid = settings.grid or specs[0].grid
        alike = {grid, *(spec.grid for spec in specs)} == {grid}
        for i, spec in enumerate(() if alike else specs):
            if spec.grid[0] == 1 < spec.tokens:
                raise PlanError(
                    f"channel_concat: encoder {i} gives a strip of {spec.tokens} tokens, which has no rows "
                    "to bring to another grid. Leave out what makes it one, such as `class_token: keep`, or "
                    "take the fusion sequence_append"
                )
        return VisionSpec(grid, sum(spec.channels for spec in specs))

    @classmethod
    def warnings(cls, settings: ChannelConcatSettings, specs: Sequence[VisionSpec]) -> list[str]:
        """Maps with fewer cells than the grid: the tokens between are interpolated."""
        grid = cls.plan(settings, specs).grid
        return [
            f"channel_concat: encoder {i} gives {spec.grid}, which is interpolated to {grid}: "
            f"{math.prod(grid)} tokens with the detail of {spec.tokens}. Take a larger image_size, or `grid: "
            f"{list(spec.grid)}`"
            for i, spec in enumerate(specs)
            if any(cells < wanted for cells, wanted in zip(spec.grid, grid, strict=True))
        ]

    def merge(self, maps: Sequence[FeatureMap], context: TextContext | None = None) -> FeatureMap:
        """Norm, resample, stack; in training, some encoders' channels may be zero."""
        stacked = [
            FeatureMap(norm(m.tokens), m.grid).resampled(self.grid, self.resampling).tokens
            for norm, m in zip(self.norms, maps, strict=True)
        ]
        if self.training and self.encoder_dropout:
            lost_EI11 = self._lost(stacked)
            stacked = [x.masked_fill(lost, 0) for x, lost in zip(stacked, lost_EI11, strict=True)]
        return FeatureMap(torch.cat(stacked, dim=-1), self.grid)

    def _lost(self, stacked: Sequence[Tensor]) -> Tensor:
        """Which encoders are lost to which picture: (E, I, 1, 1); the one drawn highest stays."""
        draws_EI = torch.rand(len(stacked), stacked[0].shape[0], device=stacked[0].device)
        lost_EI = (draws_EI < self.encoder_dropout) & (draws_EI < draws_EI.amax(0))
        return lost_EI[..., None, None]
