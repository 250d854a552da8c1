"""Deformable attention in plain torch: every query reads a few points of every map, where it chooses.

After Zhu et al., Deformable DETR (arXiv:2010.04159), equations 2 and 3.
Shape letters beyond ``vlmix.core.tensors``: E heads, D channels of a head, L levels (maps), K points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import transformers.initialization as init
from jaxtyping import Float
from torch import Tensor, nn

from vlmix.core.tensors import FeatureMap, Grid


def sample_points(
    values: Sequence[Float[Tensor, "i e d h w"]],
    places_INELK2: Float[Tensor, "i n e l k 2"],
    weights_INELK: Float[Tensor, "i n e l k"],
) -> Float[Tensor, "i n c"]:
    """Weighted sum of bilinear samples of each level: (I, N, E * D), in float32.

    ``places_INELK2`` are (x, y) in 0..1 of each level's own area, cell edges aligned; outside is zero.
    """
    total_IEDN = None
    for level, value_IEDHW in enumerate(values):
        i, e, d = value_IEDHW.shape[:3]
        grid = 2 * places_INELK2[:, :, :, level].transpose(1, 2).flatten(0, 1).float() - 1
        sampled = F.grid_sample(
            value_IEDHW.flatten(0, 1).float(), grid, "bilinear", "zeros", align_corners=False
        )
        weight = weights_INELK[:, :, :, level].transpose(1, 2).flatten(0, 1).unsqueeze(1).float()
        part_IEDN = (sampled * weight).sum(-1).view(i, e, d, -1)
        total_IEDN = part_IEDN if total_IEDN is None else total_IEDN + part_IEDN
    if total_IEDN is None:
        raise ValueError("sample_points needs at least one level")
    return total_IEDN.permute(0, 3, 1, 2).flatten(2)


def cell_centres(grid: Grid, like: Tensor) -> Float[Tensor, "n 2"]:
    """Centres of a grid's cells in row-major order as (x, y) in 0..1."""
    rows, columns = grid
    y = (torch.arange(rows, device=like.device, dtype=torch.float32) + 0.5) / rows
    x = (torch.arange(columns, device=like.device, dtype=torch.float32) + 0.5) / columns
    return torch.stack((x.repeat(rows), y.repeat_interleave(columns)), dim=-1)


class DeformableAttention(nn.Module):
    """Queries (I, N, C) at reference points over maps of any channels; gives (I, N, C).

    Offsets are in cells of the level they point into.
    """

    def __init__(self, width: int, channels: Sequence[int], heads: int, points: int) -> None:
        super().__init__()
        self.heads, self.points = heads, points
        self.offsets = nn.Linear(width, heads * len(channels) * points * 2)
        self.scores = nn.Linear(width, heads * len(channels) * points)
        self.values = nn.ModuleList(nn.Linear(count, width) for count in channels)
        self.out = nn.Linear(width, width)

    def reset(self) -> None:
        """Point k of a head looks k + 1 cells in the head's own direction, all points count alike."""
        init.zeros_(self.offsets.weight)
        init.zeros_(self.scores.weight)
        init.zeros_(self.scores.bias)
        init.copy_(self.offsets.bias, self._rays())

    def _rays(self) -> Tensor:
        angle_E = torch.arange(self.heads, device=self.offsets.bias.device) * (2 * math.pi / self.heads)
        ray_E2 = torch.stack((angle_E.cos(), angle_E.sin()), dim=-1)
        ray_E2 = ray_E2 / ray_E2.abs().amax(-1, keepdim=True)
        steps_K1 = torch.arange(1, self.points + 1, device=ray_E2.device)[:, None]
        rays_ELK2 = ray_E2[:, None, None] * steps_K1.expand(len(self.values), -1, 2)
        return rays_ELK2.flatten().to(self.offsets.bias.dtype)

    def forward(
        self, query_INC: Tensor, references_N2: Tensor, maps: Sequence[FeatureMap]
    ) -> Float[Tensor, "i n c"]:
        """Attend from every query to its points of every map; ``references_N2`` are (x, y) in 0..1."""
        shape = (self.heads, len(maps), self.points)
        offsets_INELK2 = self.offsets(query_INC).unflatten(-1, (*shape, 2)).float()
        weights_INELK = self.scores(query_INC).unflatten(-1, (self.heads, -1)).float().softmax(-1)
        cells_L12 = torch.tensor([[m.grid[1], m.grid[0]] for m in maps], device=query_INC.device)[:, None]
        places_INELK2 = references_N2[:, None, None, None] + offsets_INELK2 / cells_L12
        values = [self._heads(value(m.tokens), m.grid) for value, m in zip(self.values, maps, strict=True)]
        pooled_INC = sample_points(values, places_INELK2, weights_INELK.unflatten(-1, shape[1:]))
        return self.out(pooled_INC.to(query_INC.dtype))

    def _heads(self, value_INC: Tensor, grid: Grid) -> Tensor:
        return value_INC.unflatten(1, grid).unflatten(-1, (self.heads, -1)).permute(0, 3, 4, 1, 2)
