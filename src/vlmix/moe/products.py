"""Rows sorted by expert, and products with stacked weights whose gradients are written into one stack.

S counts choices: K of each of the R rows. Indexing a stack instead gives every expert a gradient of the
whole stack's size.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, slots=True)
class Sorting:
    """Choices in the order of their experts: ``order`` (S) sorts them, ``back`` (R, K) says where each went.

    Expert e has the sorted choices from ``bounds[e]`` to ``bounds[e + 1]``. Those behind the last bound are
    of experts that are elsewhere and give 0.
    """

    order: Tensor
    back: Tensor
    bounds: list[int]

    @classmethod
    def of(cls, indices_RK: Tensor, experts: int) -> Sorting:
        """Sort the choices ``indices_RK``; an index of ``experts`` or above is one that is elsewhere."""
        order_S = indices_RK.flatten().argsort(stable=True)
        counts = torch.bincount(indices_RK.flatten(), minlength=experts)[:experts].tolist()
        places_S = torch.arange(len(order_S), device=order_S.device)
        back_RK = torch.empty_like(order_S).scatter_(0, order_S, places_S).view_as(indices_RK)
        return cls(order_S, back_RK, list(accumulate(counts, initial=0)))

    @property
    def rows(self) -> Tensor:
        """The row of each sorted choice (S)."""
        return self.order // self.back.shape[1]

    def spans(self) -> list[tuple[int, slice]]:
        """Every expert that has choices, and where they are."""
        pairs = enumerate(pairwise(self.bounds))
        return [(expert, slice(start, stop)) for expert, (start, stop) in pairs if start < stop]


def gather(x_RD: Tensor, sorting: Sorting) -> Tensor:
    """The row of each sorted choice: (S, D)."""
    return _apply(_Gather, x_RD, sorting)


def multiply(x_SI: Tensor, stack_EOI: Tensor, bias_EO: Tensor | None, sorting: Sorting) -> Tensor:
    """Every sorted choice times its expert's matrix, in the precision of the choices: (S, O)."""
    return _apply(_Multiply, x_SI, stack_EOI, bias_EO, sorting)


def combine(y_SO: Tensor, weights_RK: Tensor, sorting: Sorting) -> Tensor:
    """The weighted sum of each row's choices, added up in float32 or better: (R, O)."""
    return _apply(_Combine, y_SO, weights_RK, sorting)


def _apply(function: type[Function], *inputs: Any) -> Tensor:
    return function.apply(*inputs)  # pyright: ignore[reportReturnType]


class _Gather(Function):
    """Its gradient is read in the rows' order: no sum at random places."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, sorting: Sorting) -> Tensor:
        ctx.sorting = sorting
        return x_RD.index_select(0, sorting.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_SD: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        back_RK = ctx.sorting.back
        return g_SD.index_select(0, back_RK.flatten()).unflatten(0, back_RK.shape).sum(1), None


class _Multiply(Function):
    """Weights of another precision are converted one expert at a time, so no second stack is ever kept."""

    @staticmethod
    def forward(
        ctx: Any, x_SI: Tensor, stack_EOI: Tensor, bias_EO: Tensor | None, sorting: Sorting
    ) -> Tensor:
        ctx.save_for_backward(x_SI, stack_EOI)
        ctx.sorting, ctx.bias = sorting, None if bias_EO is None else bias_EO.dtype
        y_SO = x_SI.new_empty(len(x_SI), stack_EOI.shape[1])
        y_SO[sorting.bounds[-1] :].zero_()
        for expert, span in sorting.spans():
            matrix_IO = stack_EOI[expert].to(x_SI.dtype).T
            if bias_EO is None:
                torch.mm(x_SI[span], matrix_IO, out=y_SO[span])
            else:
                torch.addmm(bias_EO[expert].to(x_SI.dtype), x_SI[span], matrix_IO, out=y_SO[span])
        return y_SO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_SO: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_SI, stack_EOI = ctx.saved_tensors
        sorting, g_SO = ctx.sorting, g_SO.contiguous()
        needs_x, needs_stack, needs_bias, _ = ctx.needs_input_grad
        dx_SI = torch.empty_like(x_SI) if needs_x else None
        if dx_SI is not None:
            dx_SI[sorting.bounds[-1] :].zero_()
            for expert, span in sorting.spans():
                torch.mm(g_SO[span], stack_EOI[expert].to(g_SO.dtype), out=dx_SI[span])
        dw_EOI = _weight_gradient(g_SO, x_SI, stack_EOI, sorting) if needs_stack else None
        db_EO = None
        if needs_bias:
            db_EO = g_SO.new_zeros(stack_EOI.shape[:2], dtype=ctx.bias)
            for expert, span in sorting.spans():
                db_EO[expert] = g_SO[span].sum(0)
        return dx_SI, dw_EOI, db_EO, None


def _weight_gradient(g_SO: Tensor, x_SI: Tensor, stack_EOI: Tensor, sorting: Sorting) -> Tensor:
    """Experts without choices get 0, not nothing: their optimizer steps like any other."""
    dw_EOI = torch.empty_like(stack_EOI, memory_format=torch.contiguous_format)
    done = 0
    for expert, span in sorting.spans():
        if done < expert:
            dw_EOI[done:expert].zero_()
        g_RO, x_RI, dw_OI = g_SO[span], x_SI[span], dw_EOI[expert]
        if dw_OI.dtype != g_RO.dtype:
            dw_OI.copy_(g_RO.T @ x_RI)
        elif len(g_RO) == 1:
            # A product of two vectors has nothing to add up: several times faster without matrix products.
            torch.mul(g_RO.T, x_RI, out=dw_OI)
        else:
            torch.mm(g_RO.T, x_RI, out=dw_OI)
        done = expert + 1
    dw_EOI[done:].zero_()
    return dw_EOI


class _Combine(Function):
    """Keeps the experts' outputs once, in their own order."""

    @staticmethod
    def forward(ctx: Any, y_SO: Tensor, weights_RK: Tensor, sorting: Sorting) -> Tensor:
        ctx.save_for_backward(y_SO, weights_RK)
        ctx.sorting = sorting
        exact = torch.promote_types(y_SO.dtype, torch.float32)
        sums_RO = F.embedding_bag(
            sorting.back, y_SO.to(exact), mode="sum", per_sample_weights=weights_RK.to(exact)
        )
        return sums_RO.to(y_SO.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_RO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        y_SO, weights_RK = ctx.saved_tensors
        sorting = ctx.sorting
        dy_SO = dw_RK = None
        g_SO = g_RO.index_select(0, sorting.rows)
        if ctx.needs_input_grad[1]:
            dw_S = (g_SO * y_SO).sum(-1, dtype=torch.promote_types(weights_RK.dtype, torch.float32))
            dw_RK = dw_S[sorting.back].to(weights_RK.dtype)
        if ctx.needs_input_grad[0]:
            dy_SO = g_SO.mul_(weights_RK.flatten()[sorting.order].unsqueeze(-1))
        return dy_SO, dw_RK, None
