"""Experts choose tokens, each the likeliest of every row, so all have the same load (not in decoders)."""

from __future__ import annotations

import math
from typing import Literal, Self

import torch
from pydantic import PositiveFloat
from torch import Tensor

from vlmix.core.errors import PlanError
from vlmix.core.interfaces import Router
from vlmix.core.parts import ROUTERS
from vlmix.core.settings import PartSettings
from vlmix.core.tensors import Routing
from vlmix.moe.routers._base import Scores


class ExpertChoiceSettings(PartSettings):
    """``capacity`` experts see a token on average; a single one may be seen by all of them or by none."""

    kind: Literal["expert_choice"] = "expert_choice"  # pyright: ignore[reportIncompatibleVariableOverride]
    capacity: PositiveFloat = 2.0

    @classmethod
    def tiny(cls) -> Self:
        """Two experts a token."""
        return cls(capacity=2.0)


@ROUTERS.register("expert_choice")
class ExpertChoiceRouter(Router):
    """p = softmax(W x); expert e takes the C = capacity * T / E tokens with the largest p_e.

    Paper: arXiv:2202.09368, section 3.2.
    """

    settings_class = ExpertChoiceSettings
    causal = False

    def __init__(self, settings: ExpertChoiceSettings, width: int, experts: int) -> None:
        super().__init__()
        self.settings, self.experts = settings, experts
        self.gate = Scores(width, experts)

    @classmethod
    def plan(cls, settings: ExpertChoiceSettings, experts: int) -> None:
        """No token can be seen by more experts than there are.

        Raises:
            PlanError: with both numbers.

        """
        if settings.capacity > experts:
            raise PlanError(f"router.capacity: {settings.capacity} experts a token, and there are {experts}")

    @classmethod
    def met(cls, settings: ExpertChoiceSettings, experts: int) -> int:
        """The capacity, as a whole number."""
        return math.ceil(settings.capacity)

    def reset(self) -> None:
        """Start with nearly even scores."""
        self.gate.reset()

    def taken(self, tokens: int) -> int:
        """How many of a row's tokens each expert takes; C above, rounded up."""
        return math.ceil(self.settings.capacity * tokens / self.experts)

    def forward(self, x_BTD: Tensor) -> Routing:
        """Rows of the batch do not compete; working rows are sorted by row, then expert, then share."""
        rows, tokens, _ = x_BTD.shape
        logits_TE = self.gate(x_BTD)
        probabilities_TE = logits_TE.softmax(-1)
        shares_BET = probabilities_TE.unflatten(0, (rows, tokens)).transpose(1, 2)
        weights_BEC, tokens_BEC = shares_BET.topk(self.taken(tokens))
        first_B = torch.arange(rows, device=x_BTD.device) * tokens
        experts_E = torch.arange(self.experts, device=x_BTD.device)
        return Routing(
            (rows, tokens),
            logits_TE,
            probabilities_TE,
            experts_E.view(1, -1, 1).expand_as(tokens_BEC).reshape(-1, 1),
            weights_BEC.reshape(-1, 1),
            rows=(tokens_BEC + first_B.view(-1, 1, 1)).flatten(),
        )
