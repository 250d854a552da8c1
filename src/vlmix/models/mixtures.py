"""A model's mixtures of experts: put in as its configuration says, and what they add to its loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vlmix.core.experts import ExpertSettings
from vlmix.core.tensors import Routing
from vlmix.models.configuration import VlmixConfig
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
    model: nn.Module, routings: Sequence[Routing], positions: Positions, counts: RoutingCounts | None
) -> Tensor | None:
    """The balance losses of every mixture of ``model`` in one forward pass; ``None`` if none is asked for.

    Raises:
        VlmixError: if the routers train but could not get a gradient.

    """
    if not routings:
        return None
    layers = {layer.name: layer for layer in expert_layers(model)}
    routings = [routing for routing in routings if routing.layer in layers]  # fusions route too
    groups: dict[int, tuple[ExpertSettings, list[Routing]]] = {}
    for routing in routings:
        settings = layers[routing.layer].settings
        balance = settings.balance
        if balance.switch or balance.z or balance.bias_rate:
            # The layers of one mixture share one settings object.
            groups.setdefault(id(settings), (settings, []))[1].append(routing)
    if not groups:
        return None
    check_differentiable(routings, layers)
    losses = [
        balance_loss(group, settings.balance, positions if settings.place == DECODER else None, counts)
        for settings, group in groups.values()
    ]
    return torch.stack(losses).sum()


def rebalance(model: nn.Module, counts: RoutingCounts) -> None:
    """After an optimizer step: move the biases of routers that are balanced so."""
    for layer in expert_layers(model):
        rate = layer.settings.balance.bias_rate
        if rate and layer.name in counts.layers:
            layer.router.rebalance(counts.layers[layer.name].sum(0), rate)


def active_parameters(model: nn.Module) -> int:
    """Parameters that one token meets: of experts, only as many as its router chooses."""
    total = sum(parameter.numel() for parameter in model.parameters())
    for layer in expert_layers(model):
        stacked = sum(parameter.numel() for parameter in layer.experts.parameters())
        total -= stacked - stacked * layer.chosen // layer.router_experts
    return total
