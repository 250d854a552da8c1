"""Attention pooling: every window of one map becomes one token, which attends to the window from its mean.

The pooling of Molmo (Deitke et al., arXiv:2409.17146): fewer tokens, chosen rather than averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from vlmix.core.errors import PlanError
from vlmix.core.interfaces import Fusion, VisionEncoder
from vlmix.core.parts import FUSIONS
from vlmix.core.settings import PartSettings
from vlmix.core.tensors import FeatureMap, TextContext, VisionSpec


class AttentionPoolSettings(PartSettings):
    """``window`` cells on a side become one token; ``which`` encoder, counted from 0."""

    kind: Literal["attention_pool"] = "attention_pool"  # pyright: ignore[reportIncompatibleVariableOverride]
    window: PositiveInt = 2
    heads: PositiveInt = 16
    which: NonNegativeInt = 0

    @classmethod
    def tiny(cls) -> Self:
        """Windows of 2 x 2 and two heads."""
        return cls(heads=2)


@FUSIONS.register("attention_pool")
class AttentionPool(Fusion):
    """One encoder's map with fewer tokens of the same channels."""

    settings_class = AttentionPoolSettings

    def __init__(self, settings: AttentionPoolSettings, specs: Sequence[VisionSpec]) -> None:
        super().__init__()
        self.spec = self.plan(settings, specs)
        self.which, self.window, self.heads = settings.which, settings.window, settings.heads
        width = self.spec.channels
        # A key's bias would shift every score of a window alike, which the softmax does not see.
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    @classmethod
    def plan(cls, settings: AttentionPoolSettings, specs: Sequence[VisionSpec]) -> VisionSpec:
        """The encoder's grid over the window.

        Raises:
            PlanError: if there is no such encoder, a window would hold one cell, the grid is no whole number
                of windows, or the heads do not share the channels.

        """
        if settings.which >= len(specs):
            raise PlanError(
                f"attention_pool: there is no encoder {settings.which}; they are counted from 0 and there "
                f"are {len(specs)}"
            )
        chosen, window = specs[settings.which], settings.window
        if window == 1:
            raise PlanError("attention_pool: a window of one cell leaves nothing to choose; take 2 or more")
        if any(side % window for side in chosen.grid):
            raise PlanError(
                f"attention_pool: a grid of {chosen.grid} is no whole number of {window} x {window} windows"
            )
        if chosen.channels % settings.heads:
            raise PlanError(
                f"attention_pool: {settings.heads} heads do not share {chosen.channels} channels evenly"
            )
        return VisionSpec((chosen.grid[0] // window, chosen.grid[1] // window), chosen.channels)

    @classmethod
    def warnings(cls, settings: AttentionPoolSettings, specs: Sequence[VisionSpec]) -> list[str]:
        """Encoders that never run."""
        idle = [i for i in range(len(specs)) if i != settings.which]
        if not idle:
            return []
        return [f"attention_pool: encoders {idle} do not run; their weights are kept for nothing"]

    def forward(
        self,
        encoders: Sequence[VisionEncoder],
        pixel_values: Tensor,
        context: TextContext | None = None,
    ) -> FeatureMap:
        """Run the chosen encoder only and pool its map."""
        found = encoders[self.which](pixel_values)
        windows_INMC = found.windows((self.window, self.window))
        i, n, _, c = windows_INMC.shape
        query = _heads(self.query(windows_INMC.mean(2, keepdim=True)), self.heads)
        key, value = _heads(self.key(windows_INMC), self.heads), _heads(self.value(windows_INMC), self.heads)
        attended = F.scaled_dot_product_attention(query, key, value)
        pooled_INC = attended.transpose(1, 2).reshape(i, n, c)
        return FeatureMap(self.out(pooled_INC), self.spec.grid)


def _heads(x_INMC: Tensor, heads: int) -> Tensor:
    """Windows as a batch, heads apart: (I * N, E, M, D)."""
    return x_INMC.flatten(0, 1).unflatten(-1, (heads, -1)).transpose(1, 2)
