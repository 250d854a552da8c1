"""One row through copies of the few weights it meets: where they are small, steps cost more than copies.

K is how many networks the row goes through, each another one of a stack of E; G is the inner width that is
read, I or 2 I. The gradient is written out, since each step of autograd costs more than its work here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from transformers.activations import ACT2FN

from vlmix.moe.memory import gradient_stack

# Bytes of copies up to which they surely cost less than the steps they save (measured: 3 MiB).
_SMALL: Final = 2 << 20
_SILU: Final = (F.silu, torch.ops.aten.silu_backward)
# What may stand between the products, as functions, since modules may overwrite what they read:
# the output, and the gradient of the input from that of the output.
_ACTIVATIONS: Final[Mapping[type[nn.Module], tuple[Callable[..., Tensor], Callable[..., Tensor]]]] = {
    nn.SiLU: _SILU,
    type(ACT2FN["silu"]): _SILU,  # transformers' own, whose name depends on its version
    nn.ReLU: (F.relu, lambda g, x: torch.ops.aten.threshold_backward(g, x, 0)),
}


class Gatherable(Protocol):
    """What is read of stacked experts here."""

    has_gate: bool
    has_bias: bool
    act_fn: nn.Module

    @property
    def first(self) -> Tensor:
        """The weights that read the input: (E, inner or 2 * inner, inputs)."""
        ...

    @property
    def down_proj(self) -> Tensor:
        """The weights that write the output: (E, outputs, inner)."""
        ...


def can_gather(experts: Gatherable, chosen: Sequence[int]) -> bool:
    """Are these different experts, all of them here, without biases, and small?"""
    if experts.has_bias or type(experts.act_fn) not in _ACTIVATIONS or len(set(chosen)) < len(chosen):
        return False
    first, last = experts.first, experts.down_proj
    size = (first.numel() + last.numel()) // len(first) * first.element_size()
    return max(chosen) < len(first) and len(chosen) * size <= _SMALL


def run_gathered(experts: Gatherable, x_1D: Tensor, shares_1K: Tensor, chosen: Sequence[int]) -> Tensor:
    """The row through the ``chosen`` experts, weighted and summed in one product: (1, O)."""
    given = (x_1D, shares_1K, experts.first, experts.down_proj)
    return _Row.apply(experts.act_fn, experts.has_gate, chosen, *given)  # pyright: ignore[reportReturnType]


class _Row(Function):
    """Matrices that are read lie below each other in one copy, those that write the output side by side."""

    @staticmethod
    def forward(ctx: Any, act: nn.Module, has_gate: bool, chosen: Sequence[int], *given: Tensor) -> Tensor:
        x_1D, shares_1K, first, last = given
        first_SD = torch.cat([first[expert] for expert in chosen]).to(x_1D.dtype)
        last_OS = torch.cat([last[expert] for expert in chosen], 1).to(x_1D.dtype)
        h_KG = torch.mm(x_1D, first_SD.T).view(len(chosen), -1)
        gate_KI, up_KI = h_KG.chunk(2, 1) if has_gate else (h_KG, None)
        run, ctx.gradient = _ACTIVATIONS[type(act)]
        acted_KI = run(gate_KI)
        inner_KI = acted_KI if up_KI is None else acted_KI * up_KI
        y_1S = (inner_KI * shares_1K.T).to(x_1D.dtype).view(1, -1)
        ctx.save_for_backward(*given, first_SD, last_OS, gate_KI, up_KI, acted_KI, inner_KI, y_1S)
        ctx.chosen = chosen
        return torch.mm(y_1S, last_OS.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_1O: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_1D, shares_1K, first, last, first_SD, last_OS, gate_KI, up_KI, acted_KI, inner_KI, y_1S = (
            ctx.saved_tensors
        )
        needs_x, needs_shares, needs_first, needs_last = ctx.needs_input_grad[3:]
        g_KI = torch.mm(g_1O, last_OS).view_as(inner_KI)
        d_shares = d_x = d_first = d_last = None
        if needs_shares:
            d_shares = (g_KI * inner_KI).sum(1, dtype=shares_1K.dtype).unsqueeze(0)
        g_KI = (g_KI * shares_1K.T).to(x_1D.dtype)
        if up_KI is None:
            g_KG = ctx.gradient(g_KI, gate_KI)
        else:
            g_KG = torch.cat((ctx.gradient(g_KI * up_KI, gate_KI), g_KI * acted_KI), 1)
        if needs_x:
            d_x = torch.mm(g_KG.view(1, -1), first_SD)
        if needs_first:
            d_first = gradient_stack(first, sorted(ctx.chosen))
            for expert, g_G1 in zip(ctx.chosen, g_KG.unsqueeze(-1), strict=True):
                torch.mul(g_G1, x_1D, out=d_first[expert])
        if needs_last:
            d_last = gradient_stack(last, sorted(ctx.chosen))
            for expert, y_1I in zip(ctx.chosen, y_1S.chunk(len(ctx.chosen), 1), strict=True):
                torch.mul(g_1O.T, y_1I, out=d_last[expert])
        return None, None, None, d_x, d_shares, d_first, d_last
