"""Patch info mining (Mini-Gemini): each token of the first encoder reads its own window of the second's map.

Published: tokens + softmax(q k / sqrt(width)) v over the window, with q, k, v each LayerNorm then Linear.
Computed in an equal form that makes no key or value: the key's Linear and gain move to the query, where
there is one per window instead of one per key; its biases shift all scores of a window alike and drop out of
the softmax; and because the weights sum to one, the value's gain, bias and Linear act after the pooling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self, cast

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from vlmix.core.errors import PlanError
from vlmix.core.interfaces import LateFusion
from vlmix.core.parts import FUSIONS
from vlmix.core.settings import PartSettings
from vlmix.core.tensors import FeatureMap, TextContext, VisionSpec, whole_ratio
from vlmix.fusion._mining import mine_windows


class PatchMiningSettings(PartSettings):
    """``heads`` share the first encoder's width; the published models have one."""

    kind: Literal["patch_mining"] = "patch_mining"  # pyright: ignore[reportIncompatibleVariableOverride]
    heads: PositiveInt = 1

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

    @property
    def inert_parameters(self) -> tuple[str, ...]:
        """Both key biases: they shift every score of a window alike, which the softmax does not see.

        Where windows hold one key there is nothing to choose, so query and key are inert as a whole.
        """
        if self.window == (1, 1):
            return tuple(key for key, _ in self.named_parameters() if not key.startswith("value."))
        return ("key.0.bias", "key.1.bias")

    def merge(self, maps: Sequence[FeatureMap], context: TextContext | None = None) -> FeatureMap:
        """Add to each token of the first map what it finds in its window of the second."""
        low, high = maps
        norm, _ = _pair(self.key)
        queries_INEC = self._absorbed_queries(low.tokens)
        pooled_INEC = mine_windows(high.tokens, queries_INEC, low.grid, self.window, norm.eps)
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
        gained_INEC = pooled_INEC.to(linear.weight.dtype) * norm.weight + norm.bias
        weight_EDC = linear.weight.unflatten(0, (self.heads, -1))
        return torch.einsum("inec,edc->ined", gained_INEC, weight_EDC).flatten(2) + linear.bias


def _norm_linear(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, width))


def _pair(norm_linear: nn.Sequential) -> tuple[nn.LayerNorm, nn.Linear]:
    return cast("tuple[nn.LayerNorm, nn.Linear]", tuple(norm_linear))
