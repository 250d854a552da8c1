"""Balance of experts: losses in one unit, what that unit is elsewhere, and balance by a bias.

The unit: E * sum_e f_e * P_e averaged over the layers of one mixture, which is 1 where the load is even.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, distributed

from vlmix.core.errors import VlmixError
from vlmix.core.experts import BalanceSettings
from vlmix.core.tensors import Routing
from vlmix.moe.layer import ExpertLayer, full_precision


@dataclass
class RoutingCounts:
    """Choices of one optimizer step so far, by layer and group of tokens: (groups, E).

    Given to every micro-batch of the step, it makes the shares f_e those of the batch as a whole rather than
    of the part at hand. Paper: global-batch load balancing, arXiv:2501.11873.
    """

    layers: dict[str, Tensor] = field(default_factory=dict)

    def add(self, layer: str, counts_GE: Tensor) -> Tensor:
        """Count what this micro-batch chose, on all ranks, and return the sum of the step so far."""
        total = counts_GE.clone()
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(total)
        self.layers[layer] = self.layers[layer] + total if layer in self.layers else total
        return self.layers[layer]


@dataclass(frozen=True, slots=True)
class Positions:
    """What stands where in a batch: true of real positions, and of visual ones; (B, T)."""

    real: Tensor | None = None
    visual: Tensor | None = None


def balance_loss(
    routings: Sequence[Routing],
    settings: BalanceSettings,
    positions: Positions | None = None,
    counts: RoutingCounts | None = None,
) -> Tensor:
    """The weighted losses of one mixture, averaged over its layers; a scalar in float32.

    ``positions`` are of the tokens that were routed; without them, or where a layer decides for other things
    (whole rows, views), all count.
    """
    where = positions or Positions()
    # Autocast would round counts to the eight bits of bfloat16.
    with full_precision(routings[0].logits.device):
        losses = [_layer_loss(routing, settings, where, counts) for routing in routings]
        return torch.stack(losses).mean()


def _layer_loss(
    routing: Routing, settings: BalanceSettings, positions: Positions, counts: RoutingCounts | None
) -> Tensor:
    counted_GT = _groups(routing, settings, positions)
    share_GE = _chosen(routing, settings, counted_GT)
    if counts is not None:
        share_GE = counts.add(routing.layer, share_GE)
    share_GE = share_GE / share_GE.sum(-1, keepdim=True).clamp_min(1)
    weight_GT = counted_GT / counted_GT.sum(-1, keepdim=True).clamp_min(1)
    mean_GE = weight_GT @ routing.probabilities
    present_G = counted_GT.any(-1)
    switch = (routing.experts * (share_GE * mean_GE).sum(-1) * present_G).sum() / present_G.sum().clamp_min(1)
    loss = settings.switch * switch
    if settings.z:
        real_T = counted_GT.any(0).to(mean_GE)
        spread_T = routing.logits.logsumexp(-1).square()
        loss = loss + settings.z * (spread_T * real_T).sum() / real_T.sum().clamp_min(1)
    return loss


def _groups(routing: Routing, settings: BalanceSettings, positions: Positions) -> Tensor:
    """Which decisions count, as one row for each group that is balanced by itself: (groups, T)."""
    decisions = routing.shape[0] * routing.shape[1]
    all_T = torch.ones(decisions, device=routing.logits.device)
    real, visual = (_fitting(found, routing) for found in (positions.real, positions.visual))
    if real is not None and settings.padding == "masked":
        all_T = real.flatten().to(all_T)
    if visual is None or not settings.per_modality:
        return all_T.unsqueeze(0)
    visual_T = visual.flatten().to(all_T)
    return torch.stack((all_T * visual_T, all_T * (1 - visual_T)))


def _fitting(positions: Tensor | None, routing: Routing) -> Tensor | None:
    """A mask over the decisions, if there is one for each of them; decoders may join all rows into one."""
    decisions = routing.shape[0] * routing.shape[1]
    return positions if isinstance(positions, Tensor) and positions.numel() == decisions else None


def _chosen(routing: Routing, settings: BalanceSettings, counted_GT: Tensor) -> Tensor:
    """How often each expert was chosen by the decisions that count, dropped choices included: (groups, E)."""
    if routing.mixing is not None:
        return counted_GT @ routing.probabilities.detach()
    indices_RK = routing.indices[:, :1] if settings.choices == "first" else routing.indices
    token_R = routing.rows
    counted_GR = counted_GT if token_R is None else counted_GT[:, token_R]
    chosen_RE = torch.zeros(len(indices_RK), routing.experts, device=indices_RK.device)
    chosen_RE.scatter_add_(1, indices_RK, torch.ones_like(indices_RK, dtype=chosen_RE.dtype))
    return counted_GR @ chosen_RE


def check_differentiable(routings: Iterable[Routing], layers: Mapping[str, ExpertLayer]) -> None:
    """Refuse a forward pass whose routers will get no gradient although they train.

    Raises:
        VlmixError: if layers ran under reentrant checkpointing, which cuts what they record off the graph.

    """
    for routing in routings:
        trains = any(parameter.requires_grad for parameter in layers[routing.layer].router.parameters())
        if trains and torch.is_grad_enabled() and not routing.logits.requires_grad:
            raise VlmixError(
                f"{routing.layer}: its router trains, but reentrant gradient checkpointing keeps the balance "
                "loss from reaching it. Use gradient_checkpointing_enable({'use_reentrant': False})"
            )


def deepspeed_coefficient(switch: float, layers: int) -> float:
    """DeepSpeed's coefficient for the same loss: its callers sum over layers (count first choices alone)."""
    return switch / layers


def from_deepspeed(coefficient: float, layers: int) -> float:
    """Our ``switch`` for DeepSpeed's coefficient."""
    return coefficient * layers


def huggingface_coefficient(switch: float, k: int) -> float:
    """``router_aux_loss_coef`` of transformers, whose loss is k where balanced.

    Equal for one layer; with several, theirs pools counts and probabilities over layers before it multiplies.
    """
    return switch / k


def from_huggingface(coefficient: float, k: int) -> float:
    """Our ``switch`` for transformers' coefficient."""
    return coefficient * k


def megablocks_coefficient(switch: float) -> float:
    """MegaBlocks' coefficient: the same unit."""
    return switch
