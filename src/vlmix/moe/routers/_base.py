"""What routers share: their settings, and the Linear that scores experts in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import transformers.initialization as init
from pydantic import PositiveInt
from torch import Tensor, nn

from vlmix.core.errors import PlanError
from vlmix.core.settings import PartSettings

SMALL_SPREAD = 0.02


class RouterSettings(PartSettings):
    """``k`` experts are chosen for each token."""

    k: PositiveInt = 2


class Scores(nn.Module):
    """One score an expert, without bias and in float32 whatever precision the weights are kept in."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B * T, E)."""
        return F.linear(x_BTD.flatten(0, -2), self.weight.float())

    def reset(self) -> None:
        """Nearly even scores, so that no expert is starved before it has learnt anything."""
        init.normal_(self.weight, std=SMALL_SPREAD)


def check_k(k: int, experts: int) -> None:
    """Refuse to choose more experts than there are.

    Raises:
        PlanError: with both numbers.

    """
    if k > experts:
        raise PlanError(f"router.k: {k} experts cannot be chosen from {experts}")


def decisions(x_BTD: Tensor) -> tuple[int, int]:
    """Rows of the batch, and decisions in each."""
    return x_BTD.shape[0], x_BTD.shape[1]
