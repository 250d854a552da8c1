"""Patch grids that follow a picture's shape: cut, carried through the blocks, brought to what was planned.

The pictures of a batch have one shape and so one grid: no slot is padding and nothing has to be masked.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from vlmix.core.tensors import FeatureMap, Grid


def cut_patches(x_I3HW: Float[Tensor, "i 3 h w"], patch: int) -> Float[Tensor, "i n p"]:
    """Whole patches in row-major order; within one, rows, columns, colours."""
    rows, columns = x_I3HW.shape[2] // patch, x_I3HW.shape[3] // patch
    cells = x_I3HW.unflatten(2, (rows, patch)).unflatten(4, (columns, patch))
    return cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def on_grid(x_INC: Float[Tensor, "i n c"], grid: Grid, planned: Grid) -> Tensor:
    """What blocks pass on: (I, N, C) on the planned grid, (I, H, W, C) on any other, which then tells it."""
    return x_INC if grid == planned else x_INC.unflatten(1, grid)


def planned_map(x: Tensor, planned: Grid) -> FeatureMap:
    """The map of what ``on_grid`` gave, brought to the planned grid."""
    if x.ndim == 3:
        return FeatureMap(x, planned)
    return FeatureMap(x.flatten(1, 2), (x.shape[1], x.shape[2])).resampled(planned)
