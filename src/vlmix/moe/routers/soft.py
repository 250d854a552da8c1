"""Soft mixture: every expert reads a few slots, each a mixture of all tokens of a row (not in decoders)."""

from __future__ import annotations

from typing import Literal, Self

import torch
import torch.nn.functional as F
import transformers.initialization as init
from pydantic import PositiveInt
from torch import Tensor, nn

from vlmix.core.interfaces import Router
from vlmix.core.parts import ROUTERS
from vlmix.core.settings import PartSettings
from vlmix.core.tensors import Mixing, Routing
from vlmix.moe.routers._base import Scores


class SoftSettings(PartSettings):
    """``slots`` each expert reads from each row of the batch, whatever the row's length."""

    kind: Literal["soft"] = "soft"  # pyright: ignore[reportIncompatibleVariableOverride]
    slots: PositiveInt = 1

    @classmethod
    def tiny(cls) -> Self:
        """Two slots, so that slots and experts differ in number."""
        return cls(slots=2)


@ROUTERS.register("soft")
class SoftRouter(Router):
    """z = s * norm(x) norm(W); slots read softmax(z) over tokens, tokens read softmax(z) over slots.

    Paper: Soft MoE, arXiv:2308.00951, section 2.1; normalised as in its section 2.3.
    """

    settings_class = SoftSettings
    causal = False
    mixes = True

    def __init__(self, settings: SoftSettings, width: int, experts: int) -> None:
        super().__init__()
        self.settings, self.experts = settings, experts
        self.gate = Scores(width, experts * settings.slots)
        self.scale = nn.Parameter(torch.ones(()))

    @classmethod
    def plan(cls, settings: SoftSettings, experts: int) -> None:
        """Any number of experts will do."""

    @classmethod
    def met(cls, settings: SoftSettings, experts: int) -> int:
        """A share of every token is in every slot."""
        return experts

    def reset(self) -> None:
        """Random directions; their length plays no part."""
        self.gate.reset()
        init.ones_(self.scale)

    def forward(self, x_BTD: Tensor) -> Routing:
        """Slots count expert by expert. An expert's logit and share are those of its slots together."""
        rows, tokens, _ = x_BTD.shape
        slots = self.settings.slots
        directions_SD = F.normalize(self.gate.weight.float(), dim=-1)
        z_BTS = self.scale.float() * F.linear(F.normalize(x_BTD, dim=-1), directions_SD)
        combine_BTS = z_BTS.softmax(-1)
        by_expert = (rows * tokens, self.experts, slots)
        experts_S = torch.arange(self.experts, device=x_BTD.device).repeat_interleave(slots)
        indices_R1 = experts_S.repeat(rows).unsqueeze(1)
        return Routing(
            (rows, tokens),
            z_BTS.reshape(by_expert).logsumexp(-1),
            combine_BTS.reshape(by_expert).sum(-1),
            indices_R1,
            torch.ones_like(indices_R1, dtype=z_BTS.dtype),
            mixing=Mixing(z_BTS.softmax(1).transpose(1, 2), combine_BTS),
        )
