"""As many tiles as suit the picture's shape, and a thumbnail (InternVL 1.5, arXiv:2404.16821, 3.2).

Of all grids with ``least`` to ``most`` tiles the one whose proportions are nearest to the picture's is taken;
the picture is stretched onto it. The tiles' tokens follow one another row by row; the thumbnail comes last.
"""

from __future__ import annotations

from typing import Literal, Self

from PIL import Image
from pydantic import PositiveInt, model_validator

from vlmix.core.errors import PlanError
from vlmix.core.parts import VIEWS
from vlmix.core.tensors import Grid, VisionSpec
from vlmix.core.views import Box, Size, Tiling, Views
from vlmix.views._cut import CutSettings, tiles_of


class DynamicSettings(CutSettings):
    """``least`` and ``most`` tiles; with ``thumbnail`` a picture of several tiles is shown whole as well."""

    kind: Literal["dynamic"] = "dynamic"  # pyright: ignore[reportIncompatibleVariableOverride]
    least: PositiveInt = 1
    most: PositiveInt = 12
    thumbnail: bool = True

    @classmethod
    def tiny(cls) -> Self:
        """Up to four tiles."""
        return cls(most=4)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.least > self.most:
            raise ValueError(f"least {self.least} is more than most {self.most}")
        return self


@VIEWS.register("dynamic")
class Dynamic(Views):
    """As many tokens as the picture's tiles have."""

    settings_class = DynamicSettings
    varies = True

    @classmethod
    def plan(cls, settings: DynamicSettings, spec: VisionSpec) -> Tiling:
        """The most tiles within the budget.

        Raises:
            PlanError: if even the least tiles exceed it.

        """
        allowed = _allowed(settings, spec.grid)
        if not allowed:
            least = _count(settings, settings.least) * spec.tokens
            raise PlanError(
                f"dynamic: {settings.least} tiles take {least} tokens, more than budget {settings.budget}"
            )
        rows, columns = max(allowed, key=lambda tiles: tiles[0] * tiles[1])
        return Tiling(rows, columns, rows, columns)

    @classmethod
    def tiling(cls, settings: DynamicSettings, size: Size, side: int, grid: Grid) -> Tiling:
        """The nearest proportions; of equal ones the larger while the picture fills over half of it."""
        width, height = size
        best, nearest = (1, 1), float("inf")
        for rows, columns in sorted(_allowed(settings, grid), key=lambda tiles: tiles[0] * tiles[1]):
            distance = abs(width / height - columns / rows)
            fills = width * height > 0.5 * side * side * rows * columns
            if distance < nearest or (distance == nearest and fills):
                best, nearest = (rows, columns), distance
        return Tiling(*best, height, width)

    @classmethod
    def boxes(cls, settings: DynamicSettings, tiling: Tiling) -> tuple[Box, ...]:
        """The tiles row by row, then the thumbnail if there is one."""
        rows, columns = tiling.rows, tiling.columns
        tiles = [
            (row / rows, column / columns, (row + 1) / rows, (column + 1) / columns)
            for row in range(rows)
            for column in range(columns)
        ]
        shown = [(0.0, 0.0, 1.0, 1.0)] if _count(settings, rows * columns) > rows * columns else []
        return (*tiles, *shown)

    @classmethod
    def tokens(cls, settings: DynamicSettings, tiling: Tiling, grid: Grid) -> int:
        """As many for every view."""
        return _count(settings, tiling.rows * tiling.columns) * grid[0] * grid[1]

    @classmethod
    def cut(
        cls, settings: DynamicSettings, image: Image.Image, tiling: Tiling, side: int
    ) -> list[Image.Image]:
        """Tiles of the stretched picture, and the thumbnail."""
        bicubic = Image.Resampling.BICUBIC
        canvas = image.resize((tiling.columns * side, tiling.rows * side), bicubic)
        tiles = tiles_of(canvas, side)
        more = _count(settings, len(tiles)) > len(tiles)
        return [*tiles, image.resize((side, side), bicubic)] if more else tiles

    @classmethod
    def picture_size(cls, settings: DynamicSettings) -> int | None:
        """As set."""
        return settings.picture_size


def _count(settings: DynamicSettings, tiles: int) -> int:
    """Views of a picture with so many tiles."""
    return tiles + (settings.thumbnail and tiles > 1)


def _allowed(settings: DynamicSettings, grid: Grid) -> list[Grid]:
    most = settings.most
    return [
        (rows, columns)
        for rows in range(1, most + 1)
        for columns in range(1, most // rows + 1)
        if rows * columns >= settings.least
        and (
            settings.budget is None or _count(settings, rows * columns) * grid[0] * grid[1] <= settings.budget
        )
    ]
