"""Deformable attention: tokens of the first encoder read a few points of every other map, where they choose.

Eagle (arXiv:2408.15998) compares this fusion but published neither code nor sizes; the attention is that of
Deformable DETR (arXiv:2010.04159), the sizes and the residual gain are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import torch
import transformers.initialization as init
from pydantic import PositiveInt
from torch import Tensor, nn

from vlmix.core.errors import PlanError
from vlmix.core.interfaces import LateFusion, VisionEncoder
from vlmix.core.parts import FUSIONS
from vlmix.core.settings import PartSettings
from vlmix.core.tensors import FeatureMap, TextContext, VisionSpec
from vlmix.fusion._sampling import DeformableAttention, cell_centres


class DeformableSettings(PartSettings):
    """``heads`` share the first encoder's channels; each reads ``points`` places of every other map.

    With ``levels`` an encoder that sees at several scales is read at each of them on its own grid, one after
    the other; without, its finished map is.
    """

    kind: Literal["deformable"] = "deformable"  # pyright: ignore[reportIncompatibleVariableOverride]
    heads: PositiveInt = 16
    points: PositiveInt = 4
    levels: bool = True

    @classmethod
    def tiny(cls) -> Self:
        """Two heads of two points."""
        return cls(heads=2, points=2)


@FUSIONS.register("deformable")
class Deformable(LateFusion):
    """As many tokens as the first encoder gives; at the start, exactly those."""

    settings_class = DeformableSettings

    def __init__(self, settings: DeformableSettings, specs: Sequence[VisionSpec]) -> None:
        super().__init__()
        width = self.plan(settings, specs).channels
        self.norm = nn.LayerNorm(width)
        self.levels = settings.levels
        channels = [level.channels for spec in specs[1:] for level in _levels(settings, spec)]
        self.attention = DeformableAttention(width, channels, settings.heads, settings.points)
        self.gain = nn.Parameter(torch.zeros(width))

    @classmethod
    def plan(cls, settings: DeformableSettings, specs: Sequence[VisionSpec]) -> VisionSpec:
        """The first encoder's grid and channels.

        Raises:
            PlanError: if no other encoder is there, or the heads do not share the first encoder's channels.

        """
        if len(specs) < 2:
            raise PlanError("deformable: needs a second encoder to read from; there is one")
        width = specs[0].channels
        if width % settings.heads:
            raise PlanError(
                f"deformable: {settings.heads} heads do not share {width} channels evenly; "
                "take a number that divides them"
            )
        return VisionSpec(specs[0].grid, width)

    def reset(self) -> None:
        """Start as the identity, with points spread around each token's own place."""
        super().reset()
        self.attention.reset()
        init.zeros_(self.gain)

    def forward(
        self,
        encoders: Sequence[VisionEncoder],
        pixel_values: Tensor,
        context: TextContext | None = None,
    ) -> FeatureMap:
        """Run every encoder, all but the first up to their levels where those are read, then merge."""
        if not self.levels:
            return super().forward(encoders, pixel_values, context)
        first, *others = encoders
        seen = [level for encoder in others for level in encoder.levels(pixel_values)]
        return self.merge([first(pixel_values), *seen], context)

    def merge(self, maps: Sequence[FeatureMap], context: TextContext | None = None) -> FeatureMap:
        """Add to each token of the first map what it reads from the others, or from their levels."""
        first, *others = maps
        centres_N2 = cell_centres(first.grid, first.tokens)
        read_INC = self.attention(self.norm(first.tokens), centres_N2, others)
        return FeatureMap(first.tokens + self.gain * read_INC, first.grid)


def _levels(settings: DeformableSettings, spec: VisionSpec) -> tuple[VisionSpec, ...]:
    """What is read of one encoder."""
    return spec.levels if settings.levels and spec.levels else (spec,)
