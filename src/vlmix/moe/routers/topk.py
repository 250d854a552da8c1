"""Softmax over all experts, the k likeliest chosen (Mixtral; Switch without renormalising)."""

from __future__ import annotations

from typing import Literal, Self

from torch import Tensor

from vlmix.core.interfaces import Router
from vlmix.core.parts import ROUTERS
from vlmix.core.tensors import Routing
from vlmix.moe.routers._base import RouterSettings, Scores, check_k, decisions


class TopkSettings(RouterSettings):
    """Weights of the chosen sum to 1 with ``renormalise``; without, they are their probabilities."""

    kind: Literal["topk"] = "topk"  # pyright: ignore[reportIncompatibleVariableOverride]
    renormalise: bool = True

    @classmethod
    def tiny(cls) -> Self:
        """Two of the experts."""
        return cls(k=2)


@ROUTERS.register("topk")
class TopkRouter(Router):
    """p = softmax(W x); the k largest. Papers: arXiv:2401.04088, section 2.1; arXiv:2101.03961, 2.1."""

    settings_class = TopkSettings

    def __init__(self, settings: TopkSettings, width: int, experts: int) -> None:
        super().__init__()
        self.settings = settings
        self.gate = Scores(width, experts)

    @classmethod
    def plan(cls, settings: TopkSettings, experts: int) -> None:
        """There must be k experts."""
        check_k(settings.k, experts)

    def reset(self) -> None:
        """Start with nearly even scores."""
        self.gate.reset()

    def forward(self, x_BTD: Tensor) -> Routing:
        """The same choice for the same token, wherever it stands."""
        logits_TE = self.gate(x_BTD)
        probabilities_TE = logits_TE.softmax(-1)
        weights_TK, indices_TK = probabilities_TE.topk(self.settings.k)
        if self.settings.renormalise:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return Routing(decisions(x_BTD), logits_TE, probabilities_TE, indices_TK, weights_TK)
