"""What tilings that follow the picture's shape share: settings, tiles of a canvas, tokens without padding."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Int64
from PIL import Image
from pydantic import PositiveInt
from torch import Tensor

from vlmix.core.settings import PartSettings
from vlmix.core.tensors import Grid
from vlmix.core.views import Cells, Tiling


class CutSettings(PartSettings):
    """``budget`` is the most tokens a picture may take: only tilings that keep to it are chosen from.

    ``picture_size`` is the side of the whole picture, stretched to a square, for encoders that see it.
    """

    budget: PositiveInt | None = None
    picture_size: PositiveInt | None = None
    lengths: ClassVar[tuple[str, ...]] = ("picture_size",)


def tiles_of(canvas: Image.Image, side: int) -> list[Image.Image]:
    """Squares of ``side`` pixels, row by row; the canvas is a whole number of them."""
    return [
        canvas.crop((left, top, left + side, top + side))
        for top in range(0, canvas.height, side)
        for left in range(0, canvas.width, side)
    ]


def shown_cells(tiling: Tiling, grid: Grid) -> Cells:
    """Rows and columns of a grid over a padded canvas that show the picture."""
    rows, columns = grid
    # Seven decimals as in transformers: 671.9999999999999 means 672.
    if tiling.width / tiling.height > columns / rows:
        margin = (rows - int(round(tiling.height * (columns / tiling.width), 7))) // 2
        return slice(margin, rows - margin), slice(0, columns)
    margin = (columns - int(round(tiling.width * (rows / tiling.height), 7))) // 2
    return slice(0, rows), slice(margin, columns - margin)


def unpadded_tokens(cells: Cells) -> int:
    """How many tokens these rows and columns are, ends of rows included."""
    rows, columns = cells
    return (rows.stop - rows.start) * (columns.stop - columns.start + 1)


def with_ends(numbers_HW: Int64[Tensor, "h w"]) -> Int64[Tensor, " n"]:
    """Cell numbers row by row, -1 after each row."""
    return torch.cat((numbers_HW, numbers_HW.new_full((numbers_HW.shape[0], 1), -1)), dim=1).flatten()
