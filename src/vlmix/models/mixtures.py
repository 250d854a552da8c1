"""A model's mixtures of experts: put in as its configuration says, and what they add to its loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vlmix.core.experts import ExpertSettings
from vlmix.core.tensors import Routing
from vlmix.models.configuration import VlmixConfig
from vlmix.models.quantised import quantised_numbers
from vlmix.moe.balance import Positions, RoutingCounts, balance_loss, check_differentiable
from vlmix.moe.install import DECODER, expert_layers, install


def install_mixtures(model: nn.Module, config: VlmixConfig) -> None:
    """Replace feed-forward networks of ``model``, encoders to decoder, by the layers of every mixture.

    Raises:
        PlanError: if a mixture has nothing to stand in, or its router cannot work there.

    """
    for settings in config.expert_settings():
        install(model, settings, config, causal=settings.place == DECODER)


def auxiliary_loss(
    model: nn.Module,
    routings: Sequence[Routing],
    positions: Positions,
    counts: RoutingCounts | None,
    unseen: Sequence[Routing] = (),
) -> Tensor | None:
    """The balance losses of every mixture of ``model`` in one forward pass; ``None`` if none is asked for.

    ``unseen`` was decided for pictures that no conversation shows. It counts for nothing, but other processes
    wait for it to be counted.

    Raises:
        VlmixError: if the routers train but could not get a gradient.

    """
    if not routings and not unseen:
        return None
    layers = {layer.name: layer for layer in expert_layers(model)}
    groups: dict[int, tuple[ExpertSettings, list[Routing]]] = {}
    # The layers of one mixture share one settings object; fusions route too. What was not seen ran first.
    for routing in (*unseen, *routings):
        settings = layers[routing.layer].settings if routing.layer in layers else None
        if settings and (settings.balance.switch or settings.balance.z or settings.balance.bias_rate):
            groups.setdefault(id(settings), (settings, []))[1].append(routing)
    if not groups:
        return None
    left_out = {id(routing) for routing in unseen}
    losses: list[Tensor] = []
    check_differentiable([r for r in routings if r.layer in layers], layers)
    for settings, group in groups.values():
        seen = [routing for routing in group if id(routing) not in left_out]
        if counts is not None:
            for routing in group[: len(group) - len(seen)]:
                counts.add(routing.layer, torch.zeros(1, routing.experts, device=routing.logits.device))
        if seen:
            where = positions if settings.place == DECODER else None
            losses.append(balance_loss(seen, settings.balance, where, counts))
    return torch.stack(losses).sum() if losses else None


def rebalance(model: nn.Module, counts: RoutingCounts) -> None:
    """After an optimizer step: move the biases of routers that are balanced so, of those that train."""
    for layer in expert_layers(model):
        rate = layer.settings.balance.bias_rate
        trains = any(parameter.requires_grad for parameter in layer.router.parameters())
        if rate and trains and layer.name in counts.layers:
            layer.router.rebalance(counts.layers[layer.name].sum(0), rate)


def active_parameters(model: nn.Module) -> int:
    """Parameters that one token meets: of experts, only as many as its router chooses."""
    total = sum(parameter.numel() for parameter in model.parameters()) + quantised_numbers(model)[0]
    for layer in expert_layers(model):
        stacked = sum(parameter.numel() for parameter in layer.experts.parameters())
        total -= stacked - stacked * layer.chosen // layer.router_experts
    return total
