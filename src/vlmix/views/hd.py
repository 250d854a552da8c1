"""Tiles of the canonical picture and an overview of it (Mini-Gemini's HD models, arXiv:2403.18814, 3.4).

Encoders that see views get every tile and the overview; one that sees the whole picture, at a resolution of
its own, runs once, and its map is divided among them.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from vlmix.core.parts import VIEWS
from vlmix.core.settings import PartSettings
from vlmix.core.tensors import Grid, VisionSpec, whole_ratio
from vlmix.core.views import Box, Size, Tiling, Views

_WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


class HdSettings(PartSettings):
    """``grid`` x ``grid`` tiles of ``tile_size`` pixels, and before them an ``overview`` of the same size.

    The canonical picture is resized to the tiles' common size, and that again to the overview, without
    antialiasing, as the published models were trained; ``antialias`` smooths both times.
    """

    kind: Literal["hd"] = "hd"  # pyright: ignore[reportIncompatibleVariableOverride]
    grid: PositiveInt = 2
    tile_size: PositiveInt = 336
    overview: bool = True
    antialias: bool = False
    lengths: ClassVar[tuple[str, ...]] = ("tile_size",)

    @classmethod
    def tiny(cls) -> Self:
        """Four tiles and the overview."""
        return cls(tile_size=16)


@VIEWS.register("hd")
class Hd(Views):
    """The overview's tokens, then those of the tiles row by row."""

    settings_class = HdSettings

    @classmethod
    def plan(cls, settings: HdSettings, spec: VisionSpec) -> Tiling:
        """The grid of tiles."""
        side = settings.grid * settings.tile_size
        return Tiling(settings.grid, settings.grid, side, side)

    @classmethod
    def tiling(cls, settings: HdSettings, size: Size, side: int, grid: Grid) -> Tiling:
        """The grid of tiles, whatever the picture's shape: it was made square before."""
        return Tiling(settings.grid, settings.grid, size[1], size[0])

    @classmethod
    def boxes(cls, settings: HdSettings, tiling: Tiling) -> tuple[Box, ...]:
        """The overview and the tiles, row by row."""
        count = settings.grid
        tiles = tuple(
            (row / count, column / count, (row + 1) / count, (column + 1) / count)
            for row in range(count)
            for column in range(count)
        )
        return (_WHOLE, *tiles) if settings.overview else tiles

    @classmethod
    def tokens(cls, settings: HdSettings, tiling: Tiling, grid: Grid) -> int:
        """As many for every view."""
        return len(cls.boxes(settings, tiling)) * grid[0] * grid[1]

    @classmethod
    def share(cls, settings: HdSettings, spec: VisionSpec) -> VisionSpec:
        """A tile's part of the map; the overview gets the whole map brought to that size.

        Raises:
            PlanError: if the map does not divide into tiles.

        """
        return VisionSpec(whole_ratio(spec.grid, (settings.grid, settings.grid), "hd"), spec.channels)

    def spread(self, pixel_values: Tensor) -> Tensor:
        """Overview and tiles of every picture, float in 0..1."""
        count, side = self.settings.grid, self.settings.tile_size
        x_I3SS = pixel_values.float() / 255 if pixel_values.dtype == torch.uint8 else pixel_values.float()
        large = self._resized(x_I3SS, count * side)
        tiles = large.unflatten(2, (count, side)).unflatten(4, (count, side)).permute(0, 2, 4, 1, 3, 5)
        shown = [self._resized(large, side)[:, None]] if self.settings.overview else []
        return torch.cat((*shown, tiles.flatten(1, 2)), dim=1).flatten(0, 1)

    def _resized(self, x_I3SS: Tensor, side: int) -> Tensor:
        if x_I3SS.shape[-1] == side:
            return x_I3SS
        return F.interpolate(
            x_I3SS, size=(side, side), mode="bilinear", align_corners=False, antialias=self.settings.antialias
        )
