"""One encoder's map brought to a given grid and width, so that maps of several encoders can be added.

Adaptive deformable transformation: Shen et al., MoME (arXiv:2407.12709), section 3.1. Where the paper is
silent (norms, the softmax over points, the width inside the feed-forward network) it is a layer of Deformable
DETR (arXiv:2010.04159); see ``docs/systems/mome.md``.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
import transformers.initialization as init
from torch import Tensor, nn

from vlmix.core.tensors import FeatureMap, Grid, VisionSpec
from vlmix.fusion._sampling import DeformableAttention, cell_centres

_WIDENING = 4


class AdaptiveAverage(nn.Module):
    """Means of the cells that fall into each cell of the new grid, and one Linear."""

    def __init__(self, spec: VisionSpec, grid: Grid, width: int) -> None:
        super().__init__()
        self.grid = grid
        self.out = nn.Linear(spec.channels, width)

    def reset(self) -> None:
        """Nothing special."""

    def forward(self, found: FeatureMap) -> Tensor:
        """A map of any grid -> (I, N, D)."""
        return self.out(pooled(found, self.grid))


class AdaptiveDeformable(nn.Module):
    """Coarse tokens that read the map they are the means of, where they choose, ``depth`` times.

    Each starts at the centre of its cell and learns another place to look from.
    """

    def __init__(self, spec: VisionSpec, grid: Grid, width: int, depth: int, heads: int, points: int) -> None:
        super().__init__()
        self.grid = grid
        self.references = nn.Parameter(torch.empty(grid[0] * grid[1], 2))
        self.layers = nn.ModuleList(DeformableLayer(spec.channels, heads, points) for _ in range(depth))
        self.out = nn.Linear(spec.channels, width)
        self.reset()

    def reset(self) -> None:
        """References on a regular grid, points spread around them."""
        init.copy_(self.references, cell_centres(self.grid, self.references))
        for layer in self.layers:
            cast("DeformableLayer", layer).attention.reset()

    def forward(self, found: FeatureMap) -> Tensor:
        """A map of any grid -> (I, N, D)."""
        x_INC = pooled(found, self.grid)
        for layer in self.layers:
            x_INC = layer(x_INC, self.references, found)
        return self.out(x_INC)


class DeformableLayer(nn.Module):
    """Self-attention, deformable attention over the map, feed-forward; a norm behind each sum."""

    def __init__(self, width: int, heads: int, points: int) -> None:
        super().__init__()
        self.heads = heads
        # A key's bias shifts all scores of a query alike, which the softmax does not see.
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.attention = DeformableAttention(width, [width], heads, points)
        self.up, self.down = nn.Linear(width, _WIDENING * width), nn.Linear(_WIDENING * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(self, x_INC: Tensor, references_N2: Tensor, found: FeatureMap) -> Tensor:
        """Tokens (I, N, C), refined."""
        first, second, third = self.norms
        x_INC = first(x_INC + self._attend(x_INC))
        x_INC = second(x_INC + self.attention(x_INC, references_N2, [found]))
        return third(x_INC + self.down(F.relu(self.up(x_INC))))

    def _attend(self, x_INC: Tensor) -> Tensor:
        query, key, value = (
            made(x_INC).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for made in (self.query, self.key, self.value)
        )
        read = F.scaled_dot_product_attention(query, key, value)
        return self.out(read.transpose(1, 2).flatten(2))


def pooled(found: FeatureMap, grid: Grid) -> Tensor:
    """Adaptive average pooling to a grid: (I, N, C), in the map's precision."""
    x_ICHW = F.adaptive_avg_pool2d(found.to_nchw().float(), grid)
    return FeatureMap.from_nchw(x_ICHW).tokens.to(found.tokens.dtype)
