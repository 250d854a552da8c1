"""Spatial vision aggregator (Cambrian-1, arXiv:2406.16860): queries on a grid read their window of every map.

One learned vector asks at every cell of the grid; the keys are the cells that every encoder has there, so
that encoders of any resolution meet in one softmax. This is the connector; Cambrian's further aggregators
between the decoder's layers are not part of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Self

import torch
import torch.nn.functional as F
import transformers.initialization as init
from pydantic import PositiveInt
from torch import Tensor, nn

from vlmix.core.errors import PlanError
from vlmix.core.interfaces import LateFusion
from vlmix.core.parts import FUSIONS
from vlmix.core.settings import PartSettings
from vlmix.core.tensors import FeatureMap, Grid, TextContext, VisionSpec, whole_ratio


class SpatialAggregatorSettings(PartSettings):
    """``grid`` of queries (rows, columns), the first map's unless given; ``depth`` layers of ``width``."""

    kind: Literal["spatial_aggregator"] = "spatial_aggregator"  # pyright: ignore[reportIncompatibleVariableOverride]
    grid: tuple[PositiveInt, PositiveInt] | None = None
    width: PositiveInt = 1024
    heads: PositiveInt = 16
    depth: PositiveInt = 3

    @classmethod
    def tiny(cls) -> Self:
        """Two layers of two heads on a grid of 2 x 2."""
        return cls(grid=(2, 2), width=12, heads=2, depth=2)


class AggregatorLayer(nn.Module):
    """Cross attention of one query to its windows, then an MLP; the query's own path is never normed."""

    def __init__(
        self, width: int, context: int, channels: Sequence[int], cells: Sequence[int], heads: int
    ) -> None:
        super().__init__()
        self.heads = heads
        self.proj_context = nn.Linear(context, width, bias=False)
        self.proj_in = nn.Linear(2 * width, width, bias=False)
        self.query = _norm_linear(width, width)
        self.keys = nn.ModuleList(_norm_linear(count, width) for count in channels)
        self.values = nn.ModuleList(_norm_linear(count, width) for count in channels)
        self.out = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, width, bias=False), nn.GELU(), nn.Linear(width, width, bias=False)
        )
        self.places = nn.ParameterDict(
            {
                str(i): nn.Parameter(torch.zeros(count, channels[i]))
                for i, count in enumerate(cells)
                if count > 1
            }
        )

    def forward(self, query_INC: Tensor, context_I1C: Tensor, windows: Sequence[Tensor]) -> Tensor:
        """One query for each window of every map (I, N, M, C) -> (I, N, C)."""
        context_INC = self.proj_context(context_I1C).expand_as(query_INC)
        x_INC = self.proj_in(torch.cat((query_INC, context_INC), dim=-1))
        placed = [w + self.places[str(i)] if str(i) in self.places else w for i, w in enumerate(windows)]
        keys = torch.cat([key(w) for key, w in zip(self.keys, placed, strict=True)], dim=2)
        values = torch.cat([value(w) for value, w in zip(self.values, placed, strict=True)], dim=2)
        query = self._apart(self.query(x_INC).unsqueeze(2))
        attended = F.scaled_dot_product_attention(query, self._apart(keys), self._apart(values))
        x_INC = x_INC + self.out(attended.transpose(2, 3).flatten(2))
        return query_INC + self.mlp(self.norm(x_INC))

    def _apart(self, x_INMC: Tensor) -> Tensor:
        """Heads apart: (I, N, E, M, D)."""
        return x_INMC.unflatten(-1, (self.heads, -1)).transpose(2, 3)


@FUSIONS.register("spatial_aggregator")
class SpatialAggregator(LateFusion):
    """As many tokens as the grid has cells, of the aggregator's own width."""

    settings_class = SpatialAggregatorSettings

    def __init__(self, settings: SpatialAggregatorSettings, specs: Sequence[VisionSpec]) -> None:
        super().__init__()
        spec, width = self.plan(settings, specs), settings.width
        self.grid = spec.grid
        self.windows: list[Grid] = [whole_ratio(s.grid, spec.grid, "spatial_aggregator") for s in specs]
        self.inputs = nn.ModuleList(
            nn.Sequential(
                nn.Linear(s.channels, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width)
            )
            for s in specs
        )
        self.query = nn.Parameter(torch.zeros(width))
        cells = [math.prod(window) for window in self.windows]
        widths = [width] * len(cells)
        self.layers = nn.ModuleList(
            AggregatorLayer(width, width, widths, cells, settings.heads) for _ in range(settings.depth)
        )

    @classmethod
    def plan(cls, settings: SpatialAggregatorSettings, specs: Sequence[VisionSpec]) -> VisionSpec:
        """The grid of queries with the aggregator's width.

        Raises:
            PlanError: if there are not several encoders, a map is no whole multiple of the grid, or the heads
                do not share the width.

        """
        if len(specs) < 2:
            raise PlanError(
                f"spatial_aggregator: brings several encoders together, there is {len(specs)}; for one take "
                "`attention_pool`"
            )
        grid = settings.grid or specs[0].grid
        if settings.width % settings.heads:
            raise PlanError(
                f"spatial_aggregator: {settings.heads} heads do not share a width of {settings.width} evenly"
            )
        for spec in specs:
            whole_ratio(spec.grid, grid, "spatial_aggregator")
        return VisionSpec(grid, settings.width)

    def reset(self) -> None:
        """Queries and places within a window start as unit noise, as in the authors' code."""
        super().reset()
        init.normal_(self.query, std=self.query.numel() ** -0.5)
        for layer in self.layers:
            if isinstance(layer, AggregatorLayer):
                for place in layer.places.values():
                    init.normal_(place)

    def merge(self, maps: Sequence[FeatureMap], context: TextContext | None = None) -> FeatureMap:
        """Bring every map to one width, then let every cell's query read its windows, layer by layer."""
        read = [FeatureMap(take(m.tokens), m.grid) for take, m in zip(self.inputs, maps, strict=True)]
        windows = [m.windows(window) for m, window in zip(read, self.windows, strict=True)]
        context_I1C = read[0].tokens.mean(1, keepdim=True)
        x_INC = self.query.expand(windows[0].shape[0], math.prod(self.grid), -1)
        for layer in self.layers:
            x_INC = layer(x_INC, context_I1C, windows)
        return FeatureMap(x_INC, self.grid)


def _norm_linear(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, width, bias=False))
