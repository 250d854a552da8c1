"""Tiles on the best of several canvases, and an overview (LLaVA-NeXT, "anyres").

The picture is fitted into the canvas that keeps the most of its pixels and wastes the least, centred on
black. The overview comes first; then the tiles' tokens as one large grid, row by row over all tiles, without
the rows or columns that show padding only, and with a learned token at the end of each row.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

import torch
from PIL import Image
from pydantic import Field, PositiveInt
from torch import Tensor

from vlmix.core.errors import PlanError
from vlmix.core.parts import VIEWS
from vlmix.core.tensors import Grid, VisionSpec
from vlmix.core.views import Box, Size, Tiling, Views
from vlmix.views._cut import CutSettings, shown_cells, tiles_of, unpadded_tokens, with_ends

Canvas = tuple[PositiveInt, PositiveInt]


class AnyresSettings(CutSettings):
    """``canvases`` are the grids to choose from, each (rows, columns) of tiles.

    ``merge``: ``spatial_unpad`` as above; ``spatial`` keeps padding and adds no token; ``flat`` takes tile
    after tile.
    """

    kind: Literal["anyres"] = "anyres"  # pyright: ignore[reportIncompatibleVariableOverride]
    canvases: Annotated[tuple[Canvas, ...], Field(min_length=1)] = ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))
    merge: Literal["flat", "spatial", "spatial_unpad"] = "spatial_unpad"

    @classmethod
    def tiny(cls) -> Self:
        """Three canvases."""
        return cls(canvases=((1, 2), (2, 1), (2, 2)))


@VIEWS.register("anyres")
class Anyres(Views):
    """As many tokens as the picture's shape asks for."""

    settings_class = AnyresSettings
    varies = True

    def __init__(self, settings: AnyresSettings, spec: VisionSpec) -> None:
        super().__init__(settings, spec, ends_rows=settings.merge == "spatial_unpad")

    @classmethod
    def plan(cls, settings: AnyresSettings, spec: VisionSpec) -> Tiling:
        """The largest canvas within the budget, filled.

        Raises:
            PlanError: if the tokens of a view have no rows to put together, or no canvas keeps to the budget.

        """
        if settings.merge != "flat" and spec.grid[0] == 1 < spec.grid[1]:
            raise PlanError(
                f"anyres: a strip of {spec.tokens} tokens has no rows to put together; take `merge: flat`, "
                "or a fusion that keeps a grid"
            )
        allowed = _allowed(settings, spec.grid)
        if not allowed:
            least = min(_filled(settings, canvas, spec.grid) for canvas in settings.canvases)
            raise PlanError(f"anyres: no canvas keeps to budget {settings.budget}; the least takes {least}")
        rows, columns = max(allowed, key=lambda canvas: _filled(settings, canvas, spec.grid))
        return Tiling(rows, columns, rows, columns)

    @classmethod
    def tiling(cls, settings: AnyresSettings, size: Size, side: int, grid: Grid) -> Tiling:
        """The canvas that keeps the most of the picture's pixels, and among equals wastes the least."""
        width, height = size

        def worth(canvas: Canvas) -> tuple[int, int]:
            high, wide = canvas[0] * side, canvas[1] * side
            scale = min(wide / width, high / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - high * wide

        rows, columns = max(_allowed(settings, grid), key=worth)
        return Tiling(rows, columns, height, width)

    @classmethod
    def boxes(cls, settings: AnyresSettings, tiling: Tiling) -> tuple[Box, ...]:
        """The overview, then the tiles row by row; the padded canvas reaches past the picture."""
        fit = min(tiling.columns / tiling.width, tiling.rows / tiling.height)
        across, down = tiling.columns / (fit * tiling.width), tiling.rows / (fit * tiling.height)

        def place(index: int, count: int, length: float) -> float:
            return (index / count - 0.5) * length + 0.5

        tiles = [
            (
                place(row, tiling.rows, down),
                place(column, tiling.columns, across),
                place(row + 1, tiling.rows, down),
                place(column + 1, tiling.columns, across),
            )
            for row in range(tiling.rows)
            for column in range(tiling.columns)
        ]
        return ((0.0, 0.0, 1.0, 1.0), *tiles)

    @classmethod
    def tokens(cls, settings: AnyresSettings, tiling: Tiling, grid: Grid) -> int:
        """The overview's and the tiles'; padding left out and ends of rows counted as the settings say."""
        if settings.merge != "spatial_unpad":
            return (1 + tiling.rows * tiling.columns) * math.prod(grid)
        return math.prod(grid) + unpadded_tokens(shown_cells(tiling, _large(tiling, grid)))

    @classmethod
    def cut(
        cls, settings: AnyresSettings, image: Image.Image, tiling: Tiling, side: int
    ) -> list[Image.Image]:
        """The overview, its proportions given up, and the tiles of the canvas."""
        canvas = Image.new("RGB", (tiling.columns * side, tiling.rows * side))
        inner = _fitted(image.size, canvas.size)
        corner = ((canvas.width - inner[0]) // 2, (canvas.height - inner[1]) // 2)
        canvas.paste(image.resize(inner, Image.Resampling.BICUBIC), corner)
        return [image.resize((side, side), Image.Resampling.BICUBIC), *tiles_of(canvas, side)]

    @classmethod
    def picture_size(cls, settings: AnyresSettings) -> int | None:
        """As set."""
        return settings.picture_size

    @classmethod
    def order(cls, settings: AnyresSettings, tiling: Tiling, grid: Grid) -> Tensor:
        """See the head of this file."""
        cells = math.prod(grid)
        numbers = torch.arange(cells, (1 + tiling.rows * tiling.columns) * cells)
        if settings.merge != "flat":
            tiles = numbers.view(tiling.rows, tiling.columns, *grid)
            numbers = tiles.transpose(1, 2).reshape(_large(tiling, grid))
        if settings.merge == "spatial_unpad":
            numbers = with_ends(numbers[shown_cells(tiling, _large(tiling, grid))])
        return torch.cat((torch.arange(cells), numbers.flatten()))


def _allowed(settings: AnyresSettings, grid: Grid) -> list[Canvas]:
    return [
        canvas
        for canvas in settings.canvases
        if settings.budget is None or _filled(settings, canvas, grid) <= settings.budget
    ]


def _filled(settings: AnyresSettings, canvas: Canvas, grid: Grid) -> int:
    """Tokens of a picture that fills the canvas: no other on it takes more."""
    return Anyres.tokens(settings, Tiling(*canvas, canvas[0] * grid[0], canvas[1] * grid[1]), grid)


def _fitted(size: Size, canvas: Size) -> Size:
    """The picture's size on the canvas; its shorter fit rounded up, as the authors do."""
    across, down = canvas[0] / size[0], canvas[1] / size[1]
    if across < down:
        return canvas[0], min(math.ceil(size[1] * across), canvas[1])
    return min(math.ceil(size[0] * down), canvas[0]), canvas[1]


def _large(tiling: Tiling, grid: Grid) -> Grid:
    return tiling.rows * grid[0], tiling.columns * grid[1]
