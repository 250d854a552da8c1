"""Experts: networks of one shape, their weights stacked as transformers' experts interface reads them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import torch
import transformers.initialization as init
from torch import Tensor, nn
from transformers import PreTrainedConfig

from vlmix.core.interfaces import Part
from vlmix.moe.kernels import run_kernel
from vlmix.moe.precision import linear
from vlmix.moe.structure import FeedForward, linear_weight


class StackedExperts(Part):
    """E networks ``down(act(up(x)))``, or gated ones, each row through K of them.

    Weights are (E, outputs, inputs); those of gated networks hold the gate's rows before the up rows. The
    attributes are those that kernels of the experts interface read.
    """

    has_post_expert_norm = False
    is_transposed = False
    is_concatenated = True

    def __init__(
        self,
        config: PreTrainedConfig,
        count: int,
        sizes: tuple[int, int, int],
        activation: nn.Module,
        *,
        gated: bool,
        bias: tuple[bool, bool] = (False, False),
        quiet: bool = False,
    ) -> None:
        """Make room for ``count`` networks of ``sizes`` (inputs, inner, outputs) with ``bias`` (up, down).

        ``quiet`` ones start by giving 0, whatever they read.
        """
        super().__init__()
        self.config, self.num_experts, self.act_fn = config, count, activation
        self.inputs, self.inner, self.outputs = sizes
        self.quiet = quiet
        self.has_gate, self.has_bias = gated, any(bias)
        self._is_expert_parallel = False
        first = torch.empty(count, self.inner * (2 if gated else 1), self.inputs)
        self.register_parameter(self._up, nn.Parameter(first))
        self.down_proj = nn.Parameter(torch.empty(count, self.outputs, self.inner))
        if self.has_bias:
            self.register_parameter(f"{self._up}_bias", nn.Parameter(first.new_empty(first.shape[:2])))
            self.down_proj_bias = nn.Parameter(torch.empty(count, self.outputs))

    @property
    def _up(self) -> str:
        return "gate_up_proj" if self.has_gate else "up_proj"

    @property
    def first(self) -> Tensor:
        """The stacked weights that read the input: (E, inner or 2 * inner, inputs)."""
        return getattr(self, self._up)

    @property
    def first_bias(self) -> Tensor | None:
        """Their biases (E, inner or 2 * inner)."""
        return getattr(self, f"{self._up}_bias") if self.has_bias else None

    @property
    def last_bias(self) -> Tensor | None:
        """The biases of the last products (E, outputs)."""
        return self.down_proj_bias if self.has_bias else None

    def reset(self) -> None:
        """Variance one over the inputs of every matrix; biases and quiet experts' last matrices are 0."""
        init.normal_(self.first, std=self.inputs**-0.5)
        init.normal_(self.down_proj, std=0.0 if self.quiet else self.inner**-0.5)
        if self.has_bias:
            init.zeros_(cast("Tensor", self.first_bias))
            init.zeros_(self.down_proj_bias)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Rows (R, inputs) through their experts (R, K), weighted (R, K) and summed: (R, outputs)."""
        return run_kernel(self, hidden_states, top_k_index, top_k_weights)

    def _apply_gate(self, gate_up_out: Tensor) -> Tensor:
        gate, up = gate_up_out.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def inside(self, x_SI: Tensor) -> Tensor:
        """What stands between the two products: (S, inner or 2 * inner) -> (S, inner)."""
        return self._apply_gate(x_SI) if self.has_gate else self.act_fn(x_SI)

    def alone(self, expert: int, x_RD: Tensor) -> Tensor:
        """Rows (R, inputs) through one expert, in their precision: (R, outputs)."""
        first, down = self.first[expert], self.down_proj[expert]
        if self.first_bias is None or self.last_bias is None:
            return linear(self.inside(linear(x_RD, first)), down)
        inner_RI = self.inside(linear(x_RD, first, self.first_bias[expert]))
        return linear(inner_RI, down, self.last_bias[expert])

    def cast(self, dtype: torch.dtype) -> SimpleNamespace:
        """What a kernel reads, with weights of another precision; gradients reach this module's own."""
        names = ("num_experts", "act_fn", "has_gate", "has_bias", "has_post_expert_norm", "is_transposed")
        read = {name: getattr(self, name) for name in (*names, "_is_expert_parallel", "_apply_gate")}
        weights = {name: parameter.to(dtype) for name, parameter in self.named_parameters(recurse=False)}
        return SimpleNamespace(**read, **weights)


def experts_like(
    network: nn.Module,
    shape: FeedForward,
    count: int,
    config: PreTrainedConfig,
    *,
    width: int | None = None,
    quiet: bool = False,
) -> StackedExperts:
    """Room for ``count`` experts of a network's shape, with an inner ``width`` of their own where given."""
    up, down = network.get_submodule(shape.up), network.get_submodule(shape.down)
    inputs, outputs = linear_weight(up).shape[1], linear_weight(down).shape[0]
    bias = (up.bias is not None, down.bias is not None)
    sizes = (inputs, width or linear_weight(down).shape[1], outputs)
    made = StackedExperts(config, count, sizes, shape.activation, gated=shape.gated, bias=bias, quiet=quiet)
    return made.to(device=linear_weight(up).device, dtype=linear_weight(up).dtype)


def first_of(network: nn.Module, shape: FeedForward) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of what reads the input of a network, the gate's rows before the up rows."""
    up = network.get_submodule(shape.up)
    weight, bias = linear_weight(up), cast("Tensor | None", up.bias)
    if shape.packed == "last":
        weight = weight.roll(weight.shape[0] // 2, 0)
        bias = None if bias is None else bias.roll(bias.shape[0] // 2, 0)
    if shape.gate is None:
        return weight, bias
    gate = network.get_submodule(shape.gate)
    biases = [b for b in (cast("Tensor | None", gate.bias), bias) if b is not None]
    return torch.cat((linear_weight(gate), weight)), torch.cat(biases) if biases else None


def copy_network(experts: StackedExperts, network: nn.Module, shape: FeedForward) -> None:
    """Make every expert a copy of ``network``; quiet ones keep their last matrix."""
    down = network.get_submodule(shape.down)
    weight, bias = first_of(network, shape)
    with torch.no_grad():
        experts.first.copy_(weight.expand_as(experts.first))
        if not experts.quiet:
            experts.down_proj.copy_(linear_weight(down).expand_as(experts.down_proj))
        if experts.first_bias is not None:
            _spread(bias, experts.first_bias)
            _spread(None if experts.quiet else cast("Tensor | None", down.bias), experts.down_proj_bias)


def _spread(bias: Tensor | None, stacked: Tensor) -> None:
    """Every expert's bias is that of the network, or 0 where it has none."""
    stacked.zero_() if bias is None else stacked.copy_(bias.expand_as(stacked))
