"""The padded square picture, of whose tokens only those that show the picture are kept (Cambrian-1).

A learned token ends each row (arXiv:2406.16860). Fusions that can are told which cells are padding.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from PIL import Image
from torch import Tensor

from vlmix.core.errors import PlanError
from vlmix.core.parts import VIEWS
from vlmix.core.settings import PartSettings
from vlmix.core.squares import padded
from vlmix.core.tensors import Grid, VisionSpec
from vlmix.core.views import Box, Cells, Size, Tiling, Views
from vlmix.views._cut import shown_cells, unpadded_tokens, with_ends


class UnpaddedSettings(PartSettings):
    """``pad_color`` is red, green and blue of the padding."""

    kind: Literal["unpadded"] = "unpadded"  # pyright: ignore[reportIncompatibleVariableOverride]
    pad_color: tuple[int, int, int] = (122, 116, 104)

    @classmethod
    def tiny(cls) -> Self:
        """As every other."""
        return cls()


@VIEWS.register("unpadded")
class Unpadded(Views):
    """Fewer tokens the less square a picture is."""

    settings_class = UnpaddedSettings
    varies = True

    def __init__(self, settings: UnpaddedSettings, spec: VisionSpec) -> None:
        super().__init__(settings, spec, ends_rows=True)

    @classmethod
    def plan(cls, settings: UnpaddedSettings, spec: VisionSpec) -> Tiling:
        """A square picture.

        Raises:
            PlanError: if the tokens have no rows.

        """
        if spec.grid[0] == 1 < spec.grid[1]:
            raise PlanError(
                f"unpadded: a strip of {spec.tokens} tokens has no rows; take a fusion that keeps a grid"
            )
        return Tiling(1, 1, *spec.grid)

    @classmethod
    def tiling(cls, settings: UnpaddedSettings, size: Size, side: int, grid: Grid) -> Tiling:
        """One view."""
        return Tiling(1, 1, size[1], size[0])

    @classmethod
    def boxes(cls, settings: UnpaddedSettings, tiling: Tiling) -> tuple[Box, ...]:
        """The square around the picture, reaching past its shorter sides."""
        longest = max(tiling.height, tiling.width)
        high, wide = (longest / length / 2 for length in (tiling.height, tiling.width))
        return ((0.5 - high, 0.5 - wide, 0.5 + high, 0.5 + wide),)

    @classmethod
    def tokens(cls, settings: UnpaddedSettings, tiling: Tiling, grid: Grid) -> int:
        """Those that show the picture, and one for each row."""
        return unpadded_tokens(_cells(tiling, grid))

    @classmethod
    def cut(
        cls, settings: UnpaddedSettings, image: Image.Image, tiling: Tiling, side: int
    ) -> list[Image.Image]:
        """The picture in the middle of a square."""
        return [padded(image, settings.pad_color).resize((side, side), Image.Resampling.BICUBIC)]

    @classmethod
    def shown(cls, settings: UnpaddedSettings, tiling: Tiling, grid: Grid) -> Cells:
        """The rows and columns between the padding, one at least."""
        return _cells(tiling, grid)

    @classmethod
    def order(cls, settings: UnpaddedSettings, tiling: Tiling, grid: Grid) -> Tensor:
        """The cells that show the picture, row by row, an end after each row."""
        return with_ends(torch.arange(grid[0] * grid[1]).view(grid)[_cells(tiling, grid)])


def _cells(tiling: Tiling, grid: Grid) -> Cells:
    """A picture too thin to fill a row or column still has the middle one."""
    rows, columns = (
        cells if cells.stop > cells.start else slice(count // 2, count // 2 + 1)
        for cells, count in zip(shown_cells(tiling, grid), grid, strict=True)
    )
    return rows, columns
