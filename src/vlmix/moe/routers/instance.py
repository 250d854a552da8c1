"""A small network reads the instruction and sends the whole row to one expert, or mixes several (MoME)."""

from __future__ import annotations

from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from vlmix.core.errors import PlanError
from vlmix.core.initial import fan_in
from vlmix.core.interfaces import Router
from vlmix.core.parts import ROUTERS
from vlmix.core.tensors import Routing
from vlmix.moe.routers._base import RouterSettings, check_k, decisions


class InstanceSettings(RouterSettings):
    """``width`` is that of the hidden layer; left out, that of the instruction.

    How a choice gets a gradient: ``switch`` multiplies what the expert gives by its probability, so ``k`` as
    large as the number of experts is their softmax mixture. The others choose one expert and leave what it
    gives as it is: ``straight_through`` takes the weight's gradient for that of the probability; ``gumbel``
    does so too, and in training samples the expert from softmax(z / ``temperature``).
    """

    kind: Literal["instance"] = "instance"  # pyright: ignore[reportIncompatibleVariableOverride]
    k: PositiveInt = 1
    width: PositiveInt | None = None
    gradient: Literal["switch", "straight_through", "gumbel"] = "switch"
    temperature: PositiveFloat = 1.0

    @classmethod
    def tiny(cls) -> Self:
        """A narrow hidden layer."""
        return cls(width=6)


@ROUTERS.register("instance")
class InstanceRouter(Router):
    """p = softmax(W2 GELU(W1 I + b1) + b2). Papers: MoME, arXiv:2407.12709; Switch, arXiv:2101.03961, 2.1."""

    settings_class = InstanceSettings
    reads = "instruction"

    def __init__(self, settings: InstanceSettings, width: int, experts: int) -> None:
        super().__init__()
        self.settings = settings
        inner = settings.width or width
        self.hidden, self.gate = nn.Linear(width, inner), nn.Linear(inner, experts)

    @classmethod
    def plan(cls, settings: InstanceSettings, experts: int) -> None:
        """There must be k experts.

        Raises:
            PlanError: also if the gradient is one that needs a single choice.

        """
        check_k(settings.k, experts)
        if settings.gradient != "switch" and settings.k > 1:
            raise PlanError(
                f"router.k: {settings.gradient} passes on what one expert gives, not {settings.k}; set k: 1, "
                "or gradient: switch"
            )

    def reset(self) -> None:
        """Start with scores of size one: a row has an expert of its own from the first step."""
        fan_in(self)

    def forward(self, x_BTD: Tensor) -> Routing:
        """One decision for each vector; layers give one vector a row, (B, 1, D)."""
        settings = self.settings
        inner_TM = F.gelu(_linear(self.hidden, x_BTD.flatten(0, -2)))
        logits_TE = _linear(self.gate, inner_TM)
        shares_TE = probabilities_TE = logits_TE.softmax(-1)
        if settings.gradient == "gumbel" and self.training:
            noise_TE = torch.empty_like(logits_TE).exponential_().log().neg()
            shares_TE = ((logits_TE + noise_TE) / settings.temperature).softmax(-1)
        weights_TK, indices_TK = shares_TE.topk(settings.k)
        if settings.gradient != "switch":
            weights_TK = 1 + weights_TK - weights_TK.detach()
        return Routing(decisions(x_BTD), logits_TE, probabilities_TE, indices_TK, weights_TK)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer in float32 whatever precision its weights are kept in."""
    return F.linear(x, layer.weight.float(), layer.bias.float())
