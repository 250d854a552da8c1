"""Pixel shuffle: ``factor`` x ``factor`` neighbouring tokens become one, their channels side by side.

Two orders of the joined channels are in use; ``vlmix.core.tensors.Joining`` explains them.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import PositiveInt
from torch import nn

from vlmix.core.errors import PlanError
from vlmix.core.interfaces import Projector
from vlmix.core.parts import PROJECTORS
from vlmix.core.settings import PartSettings
from vlmix.core.tensors import FeatureMap, Joining, VisionSpec
from vlmix.projectors._mlp import mlp


class PixelShuffleSettings(PartSettings):
    """``factor`` tokens along each side become one, in the channel order ``layout``.

    ``norm`` puts a LayerNorm before the ``depth`` Linear layers (InternVL's are a norm and two; Idefics3's
    is one without norm), ``hidden`` is their width in between, the language model's unless given.
    """

    kind: Literal["pixel_shuffle"] = "pixel_shuffle"  # pyright: ignore[reportIncompatibleVariableOverride]
    factor: PositiveInt = 2
    layout: Joining = "token_major"
    norm: bool = True
    depth: PositiveInt = 2
    hidden: PositiveInt | None = None

    @classmethod
    def tiny(cls) -> Self:
        """A quarter of the tokens."""
        return cls()


@PROJECTORS.register("pixel_shuffle")
class PixelShuffle(Projector):
    """Divides the number of tokens by ``factor`` squared."""

    settings_class = PixelShuffleSettings

    def __init__(self, settings: PixelShuffleSettings, spec: VisionSpec, width: int) -> None:
        super().__init__()
        self.grid = self.plan(settings, spec, width).grid
        self.layout: Joining = settings.layout
        joined = spec.channels * settings.factor**2
        self.norm = nn.LayerNorm(joined) if settings.norm else nn.Identity()
        self.layers = mlp(joined, settings.hidden or width, width, settings.depth)

    @classmethod
    def plan(cls, settings: PixelShuffleSettings, spec: VisionSpec, width: int) -> VisionSpec:
        """The grid divided by the factor, at the language model's width.

        Raises:
            PlanError: if the tokens are a strip, or a side of the grid does not divide.

        """
        rows, columns = spec.grid
        if rows == 1 and columns > 1:
            raise PlanError(
                f"pixel_shuffle: a strip of {columns} tokens has no rows and columns to join; take the "
                "projector `mlp`, or a fusion that keeps a grid"
            )
        if rows % settings.factor or columns % settings.factor:
            raise PlanError(
                f"pixel_shuffle: a grid of {spec.grid} does not divide by factor {settings.factor}; choose "
                "another factor or another image size"
            )
        return VisionSpec((rows // settings.factor, columns // settings.factor), width)

    def forward(self, features: FeatureMap) -> FeatureMap:
        """Join neighbours, norm, map."""
        joined = features.joined(self.grid, self.layout)
        return FeatureMap(self.layers(self.norm(joined.tokens)), joined.grid)
