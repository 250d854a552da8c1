"""One row through copies of the few weights it meets: where they are small, steps cost more than copies.

K is how many networks the row goes through, each another one of a stack of E.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from vlmix.moe.memory import gradient_stack
from vlmix.moe.products import Weights

# Bytes of copies up to which they surely cost less than the steps they save (measured: 3 MiB).
_SMALL: Final = 2 << 20


def can_gather(x_RD: Tensor, chosen: Sequence[int], weights: Weights) -> bool:
    """Is this one row, through different networks that are all here and small?"""
    if len(x_RD) != 1 or len(set(chosen)) < len(chosen) or max(chosen) >= len(weights.first):
        return False
    size = sum(s.numel() * s.element_size() for s in weights if s is not None) // len(weights.first)
    return len(chosen) * size <= _SMALL


def run_gathered(
    x_1D: Tensor,
    shares_1K: Tensor,
    chosen: Sequence[int],
    weights: Weights,
    inside: Callable[[Tensor], Tensor],
) -> Tensor:
    """The row through the ``chosen`` networks, weighted and summed in one product: (1, O)."""
    h_1S = _below(x_1D, weights.first, chosen)
    if weights.first_bias is not None:
        h_1S = h_1S + _below(x_1D.new_ones(1, 1), weights.first_bias.unsqueeze(-1), chosen)
    inner_KI = inside(h_1S.view(len(chosen), -1))
    y_1O = _beside((inner_KI * shares_1K.T).to(x_1D.dtype).view(1, -1), weights.last, chosen)
    if weights.last_bias is None:
        return y_1O
    return y_1O + _beside(shares_1K.to(x_1D.dtype), weights.last_bias.unsqueeze(-1), chosen)


def _below(x_1I: Tensor, stack_EOI: Tensor, chosen: Sequence[int]) -> Tensor:
    """The row times each of the ``chosen`` matrices: (1, K * O)."""
    return _Product.apply(x_1I, stack_EOI, chosen, 0)  # pyright: ignore[reportReturnType]


def _beside(x_1S: Tensor, stack_EOI: Tensor, chosen: Sequence[int]) -> Tensor:
    """K rows end to end (1, K * I), each times its matrix, summed: (1, O)."""
    return _Product.apply(x_1S, stack_EOI, chosen, 1)  # pyright: ignore[reportReturnType]


class _Product(Function):
    """A row times matrices of a stack that are put below each other (``side`` 0) or beside (1)."""

    @staticmethod
    def forward(ctx: Any, x_1I: Tensor, stack_EOI: Tensor, chosen: Sequence[int], side: int) -> Tensor:
        weight_OI = torch.cat([stack_EOI[network] for network in chosen], side).to(x_1I.dtype)
        ctx.save_for_backward(x_1I, weight_OI, stack_EOI)
        ctx.chosen, ctx.side = chosen, side
        return torch.mm(x_1I, weight_OI.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_1O: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_1I, weight_OI, stack_EOI = ctx.saved_tensors
        d_x = torch.mm(g_1O, weight_OI) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return d_x, None, None, None
        d_stack, count = gradient_stack(stack_EOI, sorted(ctx.chosen)), len(ctx.chosen)
        gs = [g_1O] * count if ctx.side else g_1O.chunk(count, 1)
        xs = x_1I.chunk(count, 1) if ctx.side else [x_1I] * count
        for network, g, x in zip(ctx.chosen, gs, xs, strict=True):
            torch.mul(g.T, x, out=d_stack[network])
        return d_x, d_stack, None, None
