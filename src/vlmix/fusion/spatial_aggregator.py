"""Spatial vision aggregator (Cambrian-1, arXiv:2406.16860): queries on a grid read their window of every map.

One learned vector asks at every cell of the grid, and the cells that every encoder has there answer, so that
encoders of any resolution meet. With ``inside`` the visual tokens ask again, behind layers of the decoder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, cast

import torch
import transformers.initialization as init
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from vlmix.core.errors import PlanError
from vlmix.core.interfaces import LateFusion
from vlmix.core.parts import FUSIONS
from vlmix.core.settings import SHRUNK_DEPTH, SHRUNK_WIDTH, PartSettings, Settings
from vlmix.core.tensors import FeatureMap, Grid, TextContext, VisionSpec, whole_ratio
from vlmix.fusion._aggregation import AggregatorLayer, JointLayer, SeparateLayer

_LAYERS = {"joint": JointLayer, "separate": SeparateLayer}


class InsideSettings(Settings):
    """``after`` which decoder layers, counted from 0, visual tokens ask again; ``width`` is the decoder's."""

    after: tuple[NonNegativeInt, ...]
    width: PositiveInt


class SpatialAggregatorSettings(PartSettings):
    """``grid`` of queries (rows, columns), the first map's unless given; ``depth`` layers of ``width``.

    ``aggregation``: all encoders' cells in one softmax, or each encoder's in its own, weighed afterwards.
    """

    kind: Literal["spatial_aggregator"] = "spatial_aggregator"  # pyright: ignore[reportIncompatibleVariableOverride]
    grid: tuple[PositiveInt, PositiveInt] | None = None
    width: PositiveInt = 1024
    heads: PositiveInt = 16
    depth: PositiveInt = 3
    aggregation: Literal["joint", "separate"] = "joint"
    inside: InsideSettings | None = None
    lengths: ClassVar[tuple[str, ...]] = ("grid",)

    def shrunk(self, factor: int) -> Self:
        """As every part; inside, behind the layers that a shrunk decoder has."""
        small = super().shrunk(factor)
        if self.inside is None:
            return small
        after = range(min(len(self.inside.after), SHRUNK_DEPTH))
        return small.changed(inside={"after": tuple(after), "width": SHRUNK_WIDTH})

    @classmethod
    def tiny(cls) -> Self:
        """Two layers of two heads on a grid of 2 x 2."""
        return cls(grid=(2, 2), width=12, heads=2, depth=2)


@dataclass(frozen=True)
class Seen:
    """What queries read: every map's windows (I, N, M, C) with their masks, and the context (I, 1, C)."""

    windows: Sequence[Tensor]
    masks: Sequence[Tensor | None]
    context: Tensor


@FUSIONS.register("spatial_aggregator")
class SpatialAggregator(LateFusion):
    """As many tokens as the grid has cells, of the aggregator's own width."""

    settings_class = SpatialAggregatorSettings
    reads_masks = True

    def __init__(self, settings: SpatialAggregatorSettings, specs: Sequence[VisionSpec]) -> None:
        super().__init__()
        spec, width = self.plan(settings, specs), settings.width
        self.grid, self.settings = spec.grid, settings
        self.parts: list[Grid] = [whole_ratio(s.grid, spec.grid, "spatial_aggregator") for s in specs]
        self.inputs = nn.ModuleList(
            nn.Sequential(
                nn.Linear(s.channels, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width)
            )
            for s in specs
        )
        self.query = nn.Parameter(torch.zeros(1, width))
        cells = [math.prod(part) for part in self.parts]

        def layer(query: int) -> AggregatorLayer:
            kind = _LAYERS[settings.aggregation]
            return kind(query, width, width, [width] * len(cells), cells, settings.heads)

        self.layers = nn.ModuleList(layer(width) for _ in range(settings.depth))
        self.inside = nn.ModuleList()
        if settings.inside is not None:
            self.inside.extend(layer(settings.inside.width) for _ in settings.inside.after)

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

    @classmethod
    def warnings(cls, settings: SpatialAggregatorSettings, specs: Sequence[VisionSpec]) -> list[str]:
        """Windows of one cell everywhere."""
        grid = cls.plan(settings, specs).grid
        if any(spec.grid != grid for spec in specs):
            return []
        return [
            f"spatial_aggregator: every encoder gives {grid}, a cell for each query, so nothing is gathered "
            "in space; take a coarser `grid`, or an encoder with a finer map"
        ]

    @classmethod
    def inside_decoder(cls, settings: SpatialAggregatorSettings) -> tuple[tuple[int, ...], int] | None:
        """As ``inside`` says."""
        return None if settings.inside is None else (settings.inside.after, settings.inside.width)

    @property
    def inert_parameters(self) -> tuple[str, ...]:
        """A separate softmax does not see what shifts all its scores alike: its key's norm bias.

        What acts inside the decoder has no part in the map that leaves before it.
        """
        names = [name for name, _ in self.named_parameters()]
        shifts = [name for name in names if name.startswith("layers.") and name.endswith(".key.0.bias")]
        return (*shifts, *(name for name in names if name.startswith("inside.")))

    def reset(self) -> None:
        """Queries and places within a window start as noise, as in the authors' code."""
        super().reset()
        init.normal_(self.query, std=self.query.numel() ** -0.5)
        for layer in (*self.layers, *self.inside):
            cast("AggregatorLayer", layer).reset()

    def merge(self, maps: Sequence[FeatureMap], context: TextContext | None = None) -> FeatureMap:
        """Bring every map to one width, then let every cell's query read its windows, layer by layer."""
        read = [FeatureMap(take(m.tokens), m.grid) for take, m in zip(self.inputs, maps, strict=True)]
        seen = Seen(
            [m.windows(part) for m, part in zip(read, self.parts, strict=True)],
            [_window_mask(m, part) for m, part in zip(maps, self.parts, strict=True)],
            read[0].tokens.mean(1, keepdim=True),
        )
        x_INC = self.query.repeat(seen.context.shape[0], math.prod(self.grid), 1)
        for layer in self.layers:
            x_INC = layer(x_INC, seen.context, seen.windows, seen.masks)
        return FeatureMap(x_INC, self.grid, memory=seen)

    def refine(self, place: int, tokens_ND: Tensor, memory: Any, cells_N: Tensor | None) -> Tensor:
        """Every visual token reads the windows of its own cell again."""
        seen = cast("Seen", memory)

        def of_cells(x: Tensor) -> Tensor:
            flat = x.flatten(0, 1)
            return (flat if cells_N is None else flat[cells_N]).unsqueeze(0)

        context_INC = seen.context.expand(-1, math.prod(self.grid), -1)
        layer = cast("AggregatorLayer", self.inside[place])
        dtype = layer.proj_in.weight.dtype
        found = layer(
            tokens_ND.to(dtype).unsqueeze(0),
            of_cells(context_INC),
            [of_cells(w) for w in seen.windows],
            [None if m is None else of_cells(m) for m in seen.masks],
        )
        return found.squeeze(0)


def _window_mask(found: FeatureMap, part: Grid) -> Tensor | None:
    """Which cells of each window show the picture (I, N, M); a window of padding alone is read as it is."""
    if found.mask is None:
        return None
    mask_INM = FeatureMap(found.mask.unsqueeze(-1), found.grid).windows(part).squeeze(-1)
    return mask_INM | ~mask_INM.any(-1, keepdim=True)
