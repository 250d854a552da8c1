"""One expert layer: a feed-forward network's place, taken by a router and its experts."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
import transformers.initialization as init
from torch import Tensor, nn
from transformers import PreTrainedConfig

from vlmix.core.errors import PlanError
from vlmix.core.experts import ExpertSettings
from vlmix.core.interfaces import Part, Router
from vlmix.core.parts import ROUTERS, read_part
from vlmix.core.tape import instruction, record
from vlmix.core.tensors import Routing
from vlmix.moe.experts import StackedExperts, copy_network, experts_like
from vlmix.moe.lora import LoraExperts
from vlmix.moe.structure import FeedForward, linear_weight


class ExpertLayer(Part):
    """Gives what the network it replaces gave, computed by the experts its router chooses.

    ``dense`` is that network, where it stays: with adapters, with LoRA and with the residual blend.
    """

    def __init__(
        self,
        network: nn.Module,
        shape: FeedForward,
        settings: ExpertSettings,
        count: int,
        name: str,
        config: PreTrainedConfig,
    ) -> None:
        """Make room beside ``network``; ``fill`` copies its weights."""
        super().__init__()
        self.settings, self.shape, self.name = settings, shape, name
        weight = linear_weight(network.get_submodule(shape.up))
        width, place = weight.shape[1], {"device": weight.device, "dtype": weight.dtype}
        raw = read_part(ROUTERS, settings.router, "router")
        kind = ROUTERS.get(raw.kind)
        kind.plan(raw, count)
        self.router_experts, self.chosen = count, kind.met(raw, count)
        self.router: Router = kind(raw, width, count).to(device=weight.device)
        self.experts = self._experts(network, count, config)
        stays = settings.kind != "ffn" or settings.residual
        self.dense: nn.Module | None = network if stays else None
        self.shared = nn.ModuleList([copy.deepcopy(network) for _ in range(settings.shared)])
        self.blend = nn.Linear(width, 2, **place) if settings.residual else None
        self.strength = nn.Parameter(torch.ones(count, **place)) if settings.kind == "adapter" else None
        self.train(network.training)

    def _experts(self, network: nn.Module, count: int, config: PreTrainedConfig) -> nn.Module:
        shape, settings = self.shape, self.settings
        if settings.kind == "ffn":
            quiet = bool(settings.shared)
            return experts_like(network, shape, count, config, width=settings.width, quiet=quiet)
        width = cast("int", settings.width)
        if settings.kind == "lora":
            return LoraExperts(network, shape, count, width, settings.alpha / width)
        weight, down = linear_weight(network.get_submodule(shape.up)), network.get_submodule(shape.down)
        sizes = (weight.shape[1], width, linear_weight(down).shape[0])
        made = StackedExperts(config, count, sizes, nn.ReLU(), gated=False, quiet=True)
        return made.to(device=weight.device, dtype=weight.dtype)

    def reset(self) -> None:
        """Adapters at full strength, and an even blend of experts and dense network."""
        if self.strength is not None:
            init.ones_(self.strength)
        if self.blend is not None:
            init.zeros_(self.blend.weight)
            init.zeros_(cast("Tensor", self.blend.bias))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, D), (B, H, W, D) or (T, D) -> the same with the width the network gives."""
        flat = hidden_states.ndim == 2
        x_BTD = hidden_states.unsqueeze(0) if flat else hidden_states.flatten(1, -2)
        routing = self._routed(x_BTD)
        record(replace(routing, layer=self.name))
        y_BTO = self._mixed(x_BTD, _spread(routing, x_BTD.shape[1]))
        for network in self.shared:
            y_BTO = y_BTO + network(x_BTD)
        if self.blend is not None and self.dense is not None:
            shares = self.blend(x_BTD).float().softmax(-1).to(y_BTO.dtype)
            y_BTO = y_BTO * shares[..., :1] + self.dense(x_BTD) * shares[..., 1:]
        y_BTO = F.dropout(y_BTO, self.shape.dropout, self.training)
        return y_BTO.view(*hidden_states.shape[:-1], y_BTO.shape[-1])

    def _routed(self, x_BTD: Tensor) -> Routing:
        with full_precision(x_BTD.device):
            if self.settings.scope == "token":
                return self.router(x_BTD.float())
            if self.router.reads == "tokens":
                return self.router(x_BTD.float().mean(1, keepdim=True))
            told_BD = instruction()
            if told_BD is None:
                raise PlanError(
                    f"{self.name}: its router reads the instruction, and this forward pass has none. Pass "
                    "what VlmixProcessor gave, `instruction_ids` included"
                )
            return self.router(told_BD.float().unsqueeze(1))

    def _mixed(self, x_BTD: Tensor, routing: Routing) -> Tensor:
        weights_RK = routing.weights
        if self.strength is not None:
            weights_RK = weights_RK * self.strength[routing.indices]
        if self.settings.kind == "lora":
            x_TD = x_BTD.flatten(0, 1)
            shares_TE = self._shares(routing, weights_RK, len(x_TD))
            return self.experts(self.dense, x_TD, shares_TE).view(*x_BTD.shape[:2], -1)
        y_RO = self.experts(_rows_read(x_BTD, routing), routing.indices, weights_RK)
        y_BTO = _rows_put_back(y_RO, routing).view(*x_BTD.shape[:2], -1)
        return y_BTO + cast("nn.Module", self.dense)(x_BTD) if self.settings.kind == "adapter" else y_BTO

    def _shares(self, routing: Routing, weights_RK: Tensor, tokens: int) -> Tensor:
        """The weight of every expert for every token: (T, E)."""
        experts, rows_R = self.router_experts, routing.rows
        if rows_R is None:
            return weights_RK.new_zeros(tokens, experts).scatter_add_(1, routing.indices, weights_RK)
        cells_RK = rows_R.unsqueeze(1) * experts + routing.indices
        shares_S = weights_RK.new_zeros(tokens * experts)
        return shares_S.scatter_add_(0, cells_RK.flatten(), weights_RK.flatten()).view(tokens, experts)

    def fill(self, network: nn.Module) -> None:
        """Let the experts start from the weights of the network they replace, apart as the settings say."""
        settings = self.settings
        if isinstance(self.experts, StackedExperts) and settings.copies:
            copy_network(self.experts, network, self.shape)
            scatter(self.experts, settings.noise, settings.redraw)
        for extra in list(self.shared)[1:]:
            down = extra.get_submodule(self.shape.down)
            with torch.no_grad():
                for parameter in down.parameters():
                    parameter.zero_()


def scatter(experts: StackedExperts, noise: float, redraw: float) -> None:
    """Set copies apart: weights times 1 + ``noise`` n, and a share ``redraw`` of inner units drawn anew.

    New units have the mean and spread of the weights they replace. Paper: drop-upcycling, arXiv:2502.19261.
    """
    with torch.no_grad():
        for stack in (experts.first, experts.down_proj):
            if noise:
                stack.mul_(1 + noise * torch.randn_like(stack))
        count = round(redraw * experts.inner)
        for expert in range(experts.num_experts if count else 0):
            units = torch.randperm(experts.inner, device=experts.first.device)[:count]
            rows = torch.cat((units, units + experts.inner)) if experts.has_gate else units
            first, down = experts.first[expert], experts.down_proj[expert]
            first[rows] = torch.randn_like(first[rows]) * first.std() + first.mean()
            down[:, units] = torch.randn_like(down[:, units]) * down.std() + down.mean()


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """No autocast inside the ``with``."""
    known = torch.amp.is_autocast_available(device.type)  # not so for shapes without data
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def _spread(routing: Routing, tokens: int) -> Routing:
    """One decision a row as one a token, all tokens of a row alike."""
    rows, decisions = routing.shape
    if decisions == tokens or routing.rows is not None or routing.mixing is not None:
        return routing
    return replace(
        routing,
        shape=(rows, tokens),
        indices=routing.indices.repeat_interleave(tokens, 0),
        weights=routing.weights.repeat_interleave(tokens, 0),
    )


def _rows_read(x_BTD: Tensor, routing: Routing) -> Tensor:
    """What experts read: (R, D)."""
    if routing.mixing is not None:
        return (routing.mixing.dispatch.to(x_BTD.dtype) @ x_BTD).flatten(0, 1)
    x_TD = x_BTD.flatten(0, 1)
    return x_TD if routing.rows is None else x_TD.index_select(0, routing.rows)


def _rows_put_back(y_RO: Tensor, routing: Routing) -> Tensor:
    """What they give, where it belongs: (B, T, O) or (T, O). Sums are made in float32 or better."""
    if routing.mixing is not None:
        combine_BTS = routing.mixing.combine.to(y_RO.dtype)
        return combine_BTS @ y_RO.unflatten(0, (len(combine_BTS), -1))
    if routing.rows is None:
        return y_RO
    exact_RO = y_RO.to(torch.promote_types(y_RO.dtype, torch.float32))
    sums_TO = exact_RO.new_zeros(len(routing.logits), y_RO.shape[1])
    return sums_TO.index_add_(0, routing.rows, exact_RO).to(y_RO.dtype)
