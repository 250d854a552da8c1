"""Patch info mining (Mini-Gemini): each token of the first encoder reads its own window of the second's map.

Published: tokens + softmax(q k / sqrt(width)) v over the window, with q, k, v each LayerNorm then Linear.
Computed in an equal form that makes no key or value: the key's Linear and gain move to the query, where
there is one per window instead of one per key; its biases shift all scores of a window alike and drop out of
the softmax; and because the weights sum to one, the value's gain, bias and Linear act after the pooling.
Where the second encoder has several levels, their stack on the finest grid is not made either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self, cast

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from vlmix.core.errors import PlanError
from vlmix.core.interfaces import LateFusion, VisionEncoder
from vlmix.core.parts import FUSIONS
from vlmix.core.settings import PartSettings
from vlmix.core.tensors import FeatureMap, Grid, TextContext, VisionSpec, whole_ratio
from vlmix.fusion._mining import mine_windows
from vlmix.fusion._native import mine_levels


class PatchMiningSettings(PartSettings):
    """``heads`` share the first encoder's width; the published models have one.

    ``native`` reads the second encoder's levels each on its own grid, which is faster and takes a fraction of
    the memory; without it they are stacked on the finest grid first. The result is the same up to rounding.
    It has no effect where there are no levels, or one is no whole multiple of the first encoder's grid.
    """

    kind: Literal["patch_mining"] = "patch_mining"  # pyright: ignore[reportIncompatibleVariableOverride]
    heads: PositiveInt = 1
    native: bool = True

    @classmethod
    def tiny(cls) -> Self:
        """Two heads."""
        return cls(heads=2)


@FUSIONS.register("patch_mining")
class PatchMining(LateFusion):
    """The first encoder asks, the second answers; grid and channels stay those of the first."""

    settings_class = PatchMiningSettings

    def __init__(self, settings: PatchMiningSettings, specs: Sequence[VisionSpec]) -> None:
        super().__init__()
        low, high = specs
        self.heads = settings.heads
        self.window = whole_ratio(high.grid, low.grid, "patch_mining")
        self.native = settings.native and _has_whole_levels(high, low.grid)
        self.query = _norm_linear(low.channels, low.channels)
        self.key = _norm_linear(high.channels, low.channels)
        self.value = _norm_linear(high.channels, low.channels)

    @classmethod
    def plan(cls, settings: PatchMiningSettings, specs: Sequence[VisionSpec]) -> VisionSpec:
        """The first encoder's grid and channels.

        Raises:
            PlanError: if there are not two encoders, the second's grid is no whole multiple of the first's,
                or the heads do not share the first's channels.

        """
        if len(specs) != 2:
            raise PlanError(
                "patch_mining: takes two encoders, first the one whose tokens ask, then the one whose map "
                f"answers; there are {len(specs)}"
            )
        low, high = specs
        whole_ratio(high.grid, low.grid, "patch_mining")
        if low.channels % settings.heads:
            raise PlanError(
                f"patch_mining: {settings.heads} heads do not share {low.channels} channels evenly; "
                "take a number that divides them"
            )
        return VisionSpec(low.grid, low.channels)

    @classmethod
    def warnings(cls, settings: PatchMiningSettings, specs: Sequence[VisionSpec]) -> list[str]:
        """A window of one key, whose softmax is 1 whatever is asked."""
        low, high = specs
        if high.grid != low.grid:
            return []
        return [
            f"patch_mining: both encoders give {low.grid}, so a token's window holds one cell and there is "
            "nothing to choose: query and key have no effect. Take a finer map for the second encoder (an "
            "earlier stage, a larger image_size), or `channel_concat`"
        ]

    @property
    def inert_parameters(self) -> tuple[str, ...]:
        """Both key biases: they shift every score of a window alike, which the softmax does not see.

        Where windows hold one key there is nothing to choose, so query and key are inert as a whole.
        """
        if self.window == (1, 1):
            return tuple(key for key, _ in self.named_parameters() if not key.startswith("value."))
        return ("key.0.bias", "key.1.bias")

    @property
    def past_linears(self) -> tuple[str, ...]:
        """Key and value are moved to the other side of the attention."""
        return ("key.1", "value.1")

    def forward(
        self,
        encoders: Sequence[VisionEncoder],
        pixel_values: Tensor,
        context: TextContext | None = None,
    ) -> FeatureMap:
        """Run both encoders, the second one up to its levels where they are read as they are, then mine."""
        if not self.native:
            return super().forward(encoders, pixel_values, context)
        low, high = encoders
        return self.merge_levels(low(pixel_values), high.levels(pixel_values))

    def merge(self, maps: Sequence[FeatureMap], context: TextContext | None = None) -> FeatureMap:
        """Add to each token of the first map what it finds in its window of the second."""
        low, high = maps
        queries_INEC = self._absorbed_queries(low.tokens)
        return self._added(low, mine_windows(high.tokens, queries_INEC, low.grid, self.window, self.eps))

    def merge_levels(self, low: FeatureMap, levels: Sequence[FeatureMap]) -> FeatureMap:
        """As ``merge`` with the stack of ``levels``, which is not made."""
        queries_INEC = self._absorbed_queries(low.tokens)
        return self._added(low, mine_levels(levels, queries_INEC, low.grid, self.window, self.eps))

    @property
    def eps(self) -> float:
        """What the keys' LayerNorm adds to their variance."""
        return _pair(self.key)[0].eps

    def _added(self, low: FeatureMap, pooled_INEC: Tensor) -> FeatureMap:
        return FeatureMap(low.tokens + self._values(pooled_INEC).to(low.tokens.dtype), low.grid)

    def _absorbed_queries(self, low_INK: Tensor) -> Tensor:
        """Each head's query with the key's Linear, gain and the scale moved into it: (I, N, E, C)."""
        norm, linear = _pair(self.key)
        query_INED = self.query(low_INK).unflatten(-1, (self.heads, -1))
        weight_EDC = linear.weight.unflatten(0, (self.heads, -1))
        scale = query_INED.shape[-1] ** -0.5
        return torch.einsum("ined,edc->inec", query_INED, weight_EDC) * (norm.weight * scale)

    def _values(self, pooled_INEC: Tensor) -> Tensor:
        """The value's gain, bias and Linear, each head's rows on what that head pooled: (I, N, E * D)."""
        norm, linear = _pair(self.value)
        gained_INEC = torch.addcmul(norm.bias, pooled_INEC.to(linear.weight.dtype), norm.weight)
        heads = zip(gained_INEC.unbind(2), linear.weight.chunk(self.heads), strict=True)
        return torch.cat([F.linear(x_INC, weight_DC) for x_INC, weight_DC in heads], dim=-1) + linear.bias


def _has_whole_levels(spec: VisionSpec, grid: Grid) -> bool:
    """Whether the map is a stack of levels that all divide into ``grid`` windows."""
    sides = [pair for level in spec.levels for pair in zip(level.grid, grid, strict=True)]
    return bool(sides) and not any(cells % windows for cells, windows in sides)


def _norm_linear(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, width))


def _pair(norm_linear: nn.Sequential) -> tuple[nn.LayerNorm, nn.Linear]:
    return cast("tuple[nn.LayerNorm, nn.Linear]", tuple(norm_linear))
