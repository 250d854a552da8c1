"""DeepSpeed 0.9.5's gates, which MoE-LLaVA was trained with: sampled choices, capacity and dropping."""

from __future__ import annotations

import math
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveFloat
from torch import Tensor

from vlmix.core.interfaces import Router
from vlmix.core.parts import ROUTERS
from vlmix.core.tensors import Routing
from vlmix.moe.routers._base import RouterSettings, Scores, check_k, decisions

Noise = Literal["gumbel", "uniform"]


class Deepspeed095Settings(RouterSettings):
    """DeepSpeed's own names, where it has one; the values are those of MoE-LLaVA's scripts.

    An expert takes ``k * capacity_factor * tokens / experts`` tokens of a batch, padding included, and at
    least ``min_capacity``; evaluation has ``eval_capacity_factor`` instead. Without ``drop_tokens`` all
    tokens have a place; the original heeds that for ``k: 1`` alone.

    With ``k: 2`` the ``second`` expert is ``sampled`` from the softmax over the others, in evaluation too, or
    is the ``best`` of them, which the original cannot do. With ``k: 1`` places are drawn by lot
    (``random_tokens``) or go by position, and ``noisy_gate_policy: RSample`` samples the choice itself in
    training. Evaluation draws from ``seed`` and the scores at hand, so that it gives the same twice.
    """

    kind: Literal["deepspeed095"] = "deepspeed095"  # pyright: ignore[reportIncompatibleVariableOverride]
    k: int = Field(2, ge=1, le=2)
    capacity_factor: PositiveFloat = 1.5
    eval_capacity_factor: PositiveFloat = 2.0
    min_capacity: NonNegativeInt = 0
    drop_tokens: bool = True
    second: Literal["sampled", "best"] = "sampled"
    random_tokens: bool = True
    noisy_gate_policy: Literal["RSample"] | None = None
    seed: NonNegativeInt = 0

    @classmethod
    def tiny(cls) -> Self:
        """Few enough places that some choices are dropped."""
        return cls(k=2, capacity_factor=0.75, eval_capacity_factor=0.75, min_capacity=1)


@ROUTERS.register("deepspeed095")
class Deepspeed095Router(Router):
    """Softmax gates with a capacity. Papers: GShard, arXiv:2006.16668, algorithm 1; Switch, arXiv:2101.03961.

    Tokens of all rows compete for places, and with ``k: 2`` first choices go before the second ones of
    earlier tokens. So where something is dropped a token's experts depend on the rest of the batch.
    """

    settings_class = Deepspeed095Settings
    rowwise = False

    def __init__(self, settings: Deepspeed095Settings, width: int, experts: int) -> None:
        super().__init__()
        self.settings, self.experts = settings, experts
        self.gate = Scores(width, experts)

    @classmethod
    def plan(cls, settings: Deepspeed095Settings, experts: int) -> None:
        """There must be k experts."""
        check_k(settings.k, experts)

    def reset(self) -> None:
        """Start with nearly even scores."""
        self.gate.reset()

    def capacity(self, tokens: int) -> int:
        """Places of one expert for so many tokens, at the present mode's factor."""
        settings = self.settings
        factor = settings.capacity_factor if self.training else settings.eval_capacity_factor
        # In float32, as the original computes it: a product near a whole number may round up otherwise.
        exact = torch.tensor(factor * settings.k, dtype=torch.float32, device="cpu")
        return max(math.ceil((exact * (tokens / self.experts)).item()), settings.min_capacity)

    def noise(self, kind: Noise, logits_TE: Tensor) -> Tensor:
        """Fresh noise of the scores' shape. To play back recorded noise, put another function in its place.

        Training draws from torch's own generator. In evaluation the scores themselves, as integers, are part
        of the seed: layers and steps of decoding differ, and two evaluations do not.
        """
        generator = None
        if not self.training and not logits_TE.is_meta:
            seed = self.settings.seed + int(logits_TE.detach().view(torch.int32).sum())
            generator = torch.Generator(logits_TE.device).manual_seed(seed)
        drawn_TE = torch.empty_like(logits_TE)
        if kind == "uniform":
            return drawn_TE.uniform_(generator=generator)
        return drawn_TE.exponential_(generator=generator).log().neg()

    def forward(self, x_BTD: Tensor) -> Routing:
        """Dropped choices weigh 0; with ``k: 2`` the other choice then has weight 1."""
        logits_TE = self.gate(x_BTD)
        probabilities_TE = logits_TE.softmax(-1)
        indices_TK, priority_TK = self._chosen(logits_TE.detach(), probabilities_TE.detach())
        kept_TK = torch.ones_like(indices_TK, dtype=torch.bool)
        if self.settings.drop_tokens:
            place_TK = _places(indices_TK, priority_TK, self.experts)
            kept_TK = place_TK < self.capacity(len(logits_TE))
        weights_TK = probabilities_TE.gather(1, indices_TK) * kept_TK
        if self.settings.k == 2:
            total_T1 = weights_TK.sum(-1, keepdim=True)
            weights_TK = weights_TK / total_T1.clamp_min(torch.finfo(total_T1.dtype).eps)
        return Routing(decisions(x_BTD), logits_TE, probabilities_TE, indices_TK, weights_TK, kept_TK)

    def _chosen(self, logits_TE: Tensor, probabilities_TE: Tensor) -> tuple[Tensor, Tensor | None]:
        """The experts (T, K), and whose number goes first; ``None`` is by choice, then by position."""
        settings = self.settings
        if settings.k == 1:
            sampled = settings.noisy_gate_policy == "RSample" and self.training
            scores_TE = logits_TE + self.noise("gumbel", logits_TE) if sampled else probabilities_TE
            indices_T1 = scores_TE.argmax(-1, keepdim=True)
            lots = settings.random_tokens and settings.drop_tokens
            return indices_T1, self.noise("uniform", logits_TE).gather(1, indices_T1) if lots else None
        first_T1 = probabilities_TE.argmax(-1, keepdim=True)
        others_TE = logits_TE
        if settings.second == "sampled":
            others_TE = logits_TE + self.noise("gumbel", logits_TE)
        second_T1 = others_TE.scatter(1, first_T1, -torch.inf).argmax(-1, keepdim=True)
        return torch.cat((first_T1, second_T1), 1), None


def _places(indices_TK: Tensor, priority_TK: Tensor | None, experts: int) -> Tensor:
    """How many choices of the same expert go before each choice: (T, K)."""
    chosen_S = indices_TK.T.flatten()
    order_S = torch.arange(len(chosen_S), device=chosen_S.device)
    if priority_TK is not None:
        order_S = priority_TK.T.flatten().argsort(descending=True, stable=True)
    ordered_SE = F.one_hot(chosen_S[order_S], experts)
    before_S = (ordered_SE.cumsum(0) * ordered_SE).sum(-1) - 1
    place_S = torch.empty_like(before_S).scatter_(0, order_S, before_S)
    return place_S.view(indices_TK.shape[1], -1).T


def slots(routing: Routing) -> Tensor:
    """The place each kept choice has at its expert, as DeepSpeed numbers them; -1 of dropped ones: (T, K)."""
    kept_TK = torch.ones_like(routing.indices, dtype=torch.bool) if routing.kept is None else routing.kept
    # Dropped choices stand in a column of their own, so that they take no place.
    taken_TK = routing.indices.masked_fill(~kept_TK, routing.experts)
    return _places(taken_TK, None, routing.experts + 1).masked_fill(~kept_TK, -1)
