"""Networks of stacked weights as one step of autograd: rows sorted by expert, one stack of gradients.

S counts choices: K of each of the R rows. Indexing a stack instead gives every expert a gradient of the
whole stack's size, and a step for each product costs more than the product where rows are few. What stands
between the products is computed again for the gradients, so its inner values are never kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from vlmix.moe.memory import gradient_stack
from vlmix.moe.precision import multiply


@dataclass(frozen=True, slots=True)
class Sorting:
    """Choices in the order of their experts: ``rows`` (S) and ``order`` (S) say whose they are and which.

    ``back`` (R, K) says where each went. ``experts`` are those that have choices, ``sizes`` how many each;
    choices behind those are of experts that are elsewhere and give 0.
    """

    order: Tensor
    rows: Tensor
    back: Tensor
    experts: list[int]
    sizes: list[int]

    @classmethod
    def of(cls, indices_RK: Tensor, experts: int) -> Sorting:
        """Sort the choices ``indices_RK``; an index of ``experts`` or above is one that is elsewhere."""
        order_S = indices_RK.flatten().argsort(stable=True)
        counts = torch.bincount(indices_RK.flatten(), minlength=experts)[:experts].tolist()
        chosen = [expert for expert, count in enumerate(counts) if count]
        sizes = [counts[expert] for expert in chosen]
        return cls(
            order_S, order_S // indices_RK.shape[1], order_S.argsort().view_as(indices_RK), chosen, sizes
        )

    def parts(self, x_S: Tensor) -> Sequence[Tensor]:
        """The choices of each expert that has any, as views of ``x_S``; last those that are elsewhere."""
        away = len(x_S) - sum(self.sizes)
        return x_S.split([*self.sizes, away] if away else self.sizes)

    def empty(self, like: Tensor, width: int) -> Tensor:
        """Room for rows of every choice (S, width), 0 where it is elsewhere."""
        made = like.new_empty(len(self.order), width)
        if (here := sum(self.sizes)) < len(made):
            made[here:].zero_()
        return made


class Weights(NamedTuple):
    """Stacked weights of E networks, their biases where they have any."""

    first: Tensor  # (E, H, D)
    last: Tensor  # (E, O, I)
    first_bias: Tensor | None  # (E, H)
    last_bias: Tensor | None  # (E, O)


class Inside(NamedTuple):
    """What stands between the two products, (S, H) -> (S, I), and the parameters it has."""

    run: Callable[[Tensor], Tensor]
    parameters: Sequence[Tensor]


def run_networks(
    x_RD: Tensor, shares_RK: Tensor, sorting: Sorting, weights: Weights, inside: Inside
) -> Tensor:
    """Each row through its networks, weighted by its shares and added up in float32 or better: (R, O).

    Products are in the precision of the rows. ``inside`` must give the same again for the same input.
    """
    inputs = (x_RD, shares_RK, *weights, *inside.parameters)
    return _Networks.apply(sorting, inside.run, *inputs)  # pyright: ignore[reportReturnType]


def own_precision(device: str) -> AbstractContextManager[Any]:
    """Within it no autocast chooses the precision."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def combine(y_SO: Tensor, shares_RK: Tensor, sorting: Sorting) -> Tensor:
    """The weighted sum of each row's choices, added up in float32 or better: (R, O)."""
    exact = torch.promote_types(y_SO.dtype, torch.float32)
    sums_RO = F.embedding_bag(
        sorting.back, y_SO.to(exact), mode="sum", per_sample_weights=shares_RK.to(exact)
    )
    return sums_RO.to(y_SO.dtype)


class _Networks(Function):
    """Weights of another precision are converted one expert at a time, so no second stack is ever kept."""

    @staticmethod
    def forward(ctx: Any, sorting: Sorting, run: Callable[[Tensor], Tensor], *inputs: Any) -> Tensor:
        x_RD, shares_RK, first, last, first_bias, last_bias, *_ = inputs
        h_SH = _product(x_RD.index_select(0, sorting.rows), first, first_bias, sorting)
        y_SO = _product(run(h_SH), last, last_bias, sorting)
        ctx.save_for_backward(h_SH, y_SO, *inputs)
        ctx.sorting, ctx.run = sorting, run
        return combine(y_SO, shares_RK, sorting)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_RO: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        h_SH, y_SO, x_RD, shares_RK, first, last, first_bias, last_bias, *parameters = ctx.saved_tensors
        needs_x, needs_shares, *needs = ctx.needs_input_grad[2:]
        sorting: Sorting = ctx.sorting
        rows_S, back_RK = sorting.rows, sorting.back
        g_SO = g_RO.index_select(0, rows_S)
        d_shares = _share_gradient(g_SO, y_SO, shares_RK, sorting) if needs_shares else None
        g_SO = g_SO.mul_(shares_RK.flatten()[sorting.order].unsqueeze(-1))
        with torch.enable_grad(), own_precision(g_RO.device.type):
            h_SH = h_SH.detach().requires_grad_()
            inner_SI = ctx.run(h_SH)
        learnt = [p for p, need in zip(parameters, needs[4:], strict=True) if need]
        g_SH, *found = torch.autograd.grad(inner_SI, (h_SH, *learnt), _input_gradient(g_SO, last, sorting))
        d_x = d_first = d_last = d_first_bias = d_last_bias = None
        if needs_x:
            # Read in the rows' order: no sum at random places.
            d_x_RKD = _input_gradient(g_SH, first, sorting).index_select(0, back_RK.flatten())
            d_x = d_x_RKD.unflatten(0, back_RK.shape).sum(1)
        # Last, since filling stacks drives the weights that were read out of the caches.
        if needs[0]:
            d_first = _weight_gradient(g_SH, x_RD.index_select(0, rows_S), first, sorting)
        if needs[1]:
            d_last = _weight_gradient(g_SO, inner_SI.detach(), last, sorting)
        if needs[2]:
            d_first_bias = _bias_gradient(g_SH, first_bias, sorting)
        if needs[3]:
            d_last_bias = _bias_gradient(g_SO, last_bias, sorting)
        given = iter(found)
        d_parameters = (next(given) if need else None for need in needs[4:])
        return None, None, d_x, d_shares, d_first, d_last, d_first_bias, d_last_bias, *d_parameters


def _product(x_SI: Tensor, stack_EOI: Tensor, bias_EO: Tensor | None, sorting: Sorting) -> Tensor:
    """Every sorted choice times its expert's matrix: (S, O)."""
    y_SO = sorting.empty(x_SI, stack_EOI.shape[1])
    for expert, x, y in zip(sorting.experts, sorting.parts(x_SI), sorting.parts(y_SO), strict=False):
        multiply(x, stack_EOI[expert].T, y, None if bias_EO is None else bias_EO[expert])
    return y_SO


def _input_gradient(g_SO: Tensor, stack_EOI: Tensor, sorting: Sorting) -> Tensor:
    dx_SI = sorting.empty(g_SO, stack_EOI.shape[2])
    for expert, g, dx in zip(sorting.experts, sorting.parts(g_SO), sorting.parts(dx_SI), strict=False):
        multiply(g, stack_EOI[expert], dx)
    return dx_SI


def _share_gradient(g_SO: Tensor, y_SO: Tensor, shares_RK: Tensor, sorting: Sorting) -> Tensor:
    d_S = (g_SO * y_SO).sum(-1, dtype=torch.promote_types(shares_RK.dtype, torch.float32))
    return d_S[sorting.back].to(shares_RK.dtype)


def _bias_gradient(g_SO: Tensor, bias_EO: Tensor, sorting: Sorting) -> Tensor:
    d_EO = torch.zeros_like(bias_EO)
    for expert, g in zip(sorting.experts, sorting.parts(g_SO), strict=False):
        d_EO[expert] = g.sum(0)
    return d_EO


def _weight_gradient(g_SO: Tensor, x_SI: Tensor, stack_EOI: Tensor, sorting: Sorting) -> Tensor:
    """Experts without choices get 0, not nothing: their optimizer steps like any other."""
    dw_EOI = gradient_stack(stack_EOI, sorting.experts)
    for expert, g, x in zip(sorting.experts, sorting.parts(g_SO), sorting.parts(x_SI), strict=False):
        if len(g) == 1 and g.dtype == dw_EOI.dtype:
            # A product of two vectors has nothing to add up: several times faster without matrix products.
            torch.mul(g.T, x, out=dw_EOI[expert])
        else:
            multiply(g.T, x, dw_EOI[expert])
    return dw_EOI
