"""Sigmoid scores, choice by score plus a bias that balances, within the best groups (DeepSeek-V3)."""

from __future__ import annotations

from typing import Literal, Self

import torch
import transformers.initialization as init
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from vlmix.core.errors import PlanError
from vlmix.core.interfaces import Router
from vlmix.core.parts import ROUTERS
from vlmix.core.tensors import Routing
from vlmix.moe.routers._base import RouterSettings, Scores, check_k, decisions

# What DeepSeek adds to the sum of the chosen scores.
_TINY = 1e-20
# A group is worth its best experts, so many of them.
_SPEAKERS = 2


class SigmoidSettings(RouterSettings):
    """The k best of the ``groups_kept`` best of ``groups``; their weights sum to ``scale``.

    Without ``renormalise`` weights are the scores times ``scale``.
    """

    kind: Literal["sigmoid"] = "sigmoid"  # pyright: ignore[reportIncompatibleVariableOverride]
    groups: PositiveInt = 1
    groups_kept: PositiveInt = 1
    renormalise: bool = True
    scale: PositiveFloat = 1.0

    @classmethod
    def tiny(cls) -> Self:
        """One of two groups."""
        return cls(k=2, groups=2, groups_kept=1, scale=2.5)


@ROUTERS.register("sigmoid")
class SigmoidRouter(Router):
    """s = sigmoid(W x); chosen by s + b, weighed by s. Papers: arXiv:2412.19437, 2.1.2; arXiv:2408.15664."""

    settings_class = SigmoidSettings

    def __init__(self, settings: SigmoidSettings, width: int, experts: int) -> None:
        super().__init__()
        self.settings = settings
        self.gate = Scores(width, experts)
        self.register_buffer("choice_bias", torch.zeros(experts))
        self.choice_bias: Tensor

    @classmethod
    def plan(cls, settings: SigmoidSettings, experts: int) -> None:
        """There must be k experts in the groups that are kept.

        Raises:
            PlanError: if groups are uneven, or too few.

        """
        if experts % settings.groups:
            raise PlanError(f"router.groups: {experts} experts are no {settings.groups} groups of one size")
        if settings.groups_kept > settings.groups:
            raise PlanError(f"router.groups_kept: {settings.groups_kept} of {settings.groups} groups")
        check_k(settings.k, experts // settings.groups * settings.groups_kept)

    def reset(self) -> None:
        """Start with nearly even scores and without a bias."""
        self.gate.reset()
        init.zeros_(self.choice_bias)

    def forward(self, x_BTD: Tensor) -> Routing:
        """The bias takes part in the choice alone, and no gradient reaches it."""
        settings = self.settings
        logits_TE = self.gate(x_BTD)
        scores_TE = logits_TE.sigmoid()
        indices_TK = self._best(scores_TE.detach() + self.choice_bias.float()).topk(settings.k).indices
        weights_TK = scores_TE.gather(1, indices_TK)
        if settings.renormalise:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + _TINY)
        shares_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + _TINY)
        return Routing(decisions(x_BTD), logits_TE, shares_TE, indices_TK, weights_TK * settings.scale)

    def _best(self, scores_TE: Tensor) -> Tensor:
        """The scores of the best groups, and minus infinity elsewhere."""
        settings = self.settings
        if settings.groups_kept == settings.groups:
            return scores_TE
        grouped_TGM = scores_TE.unflatten(-1, (settings.groups, -1))
        speakers = min(_SPEAKERS, grouped_TGM.shape[-1])
        worth_TG = grouped_TGM.topk(speakers).values.sum(-1)
        kept_TG = torch.zeros_like(worth_TG, dtype=torch.bool)
        kept_TG.scatter_(1, worth_TG.topk(settings.groups_kept).indices, True)
        return grouped_TGM.masked_fill(~kept_TG.unsqueeze(-1), -torch.inf).flatten(1)

    @torch.no_grad()
    def rebalance(self, load_E: Tensor, rate: float) -> None:
        """Raise the bias of experts below the mean load and lower that of those above; its sum stays."""
        step_E = rate * (load_E.float().mean() - load_E.float()).sign()
        self.choice_bias += (step_E - step_E.mean()).to(self.choice_bias)
