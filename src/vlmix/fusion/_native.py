"""Attention of few queries to their own window of a large map that is never made: only its levels are there.

The map is its levels, each brought to the map's grid by bilinear interpolation (edges aligned) and stacked on
channels. Interpolation is linear, so what a key contributes follows from products at the levels' own cells.
With y_c a level's cells, B its interpolation and k_i = sum_c B_ic y_c the key at position i,

    q . normed_i = r_i (sum_l sum_c B_ic (q . y_c) - mean_i sum(q))        r_i = (var_i + eps)^(-1/2)

and pooling goes back the same way. For the variance, let a be a cell's mean over the C_l channels of its
level and z the cell less a: then C var_i = sum_l |z_i|^2 + C_l (a_i - mean_i)^2, where |z_i|^2 needs only the
products of cells that touch, and means are gone before anything is squared.

Shape letters beyond ``vlmix.core.tensors``: G W rows and columns of windows, P Q rows and columns of keys in
one window, X columns of keys in all, E heads, F = 2 E; H L rows and columns of a level's cells, R rows of
cells that the keys of one window are made of, S all rows of cells at work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmix.core.tensors import FeatureMap, Grid
from vlmix.fusion._levels import Level
from vlmix.fusion._mining import no_autocast, slopes


def mine_levels(
    levels: Sequence[FeatureMap], queries_INEC: Tensor, grid: Grid, window: Grid, eps: float
) -> Tensor:
    """What ``mine_windows`` gives for the stack of ``levels`` on ``grid * window`` positions: (I, N, E, C).

    Every level's grid must be a whole multiple of ``grid``.
    """
    cells = [level.tokens.unflatten(1, level.grid) for level in levels]
    pooled_INEC: Any = _MineLevels.apply(queries_INEC, (*grid, *window), eps, *cells)
    return pooled_INEC


class _MineLevels(torch.autograd.Function):
    """Keeps its inputs and a few numbers for each key; the backward pass makes the rest once more."""

    @staticmethod
    def forward(ctx: Any, queries_INEC: Tensor, sizes: tuple[int, ...], eps: float, *cells: Tensor) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(cells[0].dtype, queries_INEC.dtype), torch.float32)
        with no_autocast(queries_INEC):
            levels = [Level(x_IHLC, sizes, dtype) for x_IHLC in cells]
            queries_IGWEC = queries_INEC.to(dtype).unflatten(1, sizes[:2])
            keys, dots = _Keys.measured(levels, queries_IGWEC, eps)
            scores_IGWEPQ = keys.normed(dots, queries_IGWEC)
            weights_IGWEPQ = scores_IGWEPQ.flatten(-2).softmax(-1).view_as(scores_IGWEPQ)
            pooled_IGWEC = keys.pool(weights_IGWEPQ)
        ctx.save_for_backward(queries_INEC, scores_IGWEPQ, keys.mean_IGW1PQ, keys.rstd_IGW1PQ, *cells)
        ctx.sizes = sizes
        return pooled_IGWEC.flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_INEC: Tensor
    ) -> tuple[Tensor | None, ...]:
        queries_INEC, scores_IGWEPQ, mean_IGW1PQ, rstd_IGW1PQ, *cells = ctx.saved_tensors
        dtype = grad_INEC.dtype
        with no_autocast(queries_INEC):
            keys = _Keys([Level(x_IHLC, ctx.sizes, dtype) for x_IHLC in cells], mean_IGW1PQ, rstd_IGW1PQ)
            grad_IGWEC = grad_INEC.unflatten(1, ctx.sizes[:2])
            dots_IGWFPQ = torch.cat([scores_IGWEPQ, keys.dots(grad_IGWEC)], dim=3)
            slopes_IGWFPQ = slopes(dots_IGWFPQ.flatten(-2).flatten(0, 2)).view_as(dots_IGWFPQ)
            grad_queries_INEC = keys.pool(slopes_IGWFPQ.chunk(2, dim=3)[0]).flatten(1, 2)
            grads: list[Tensor | None] = [None] * len(cells)
            if any(ctx.needs_input_grad[3:]):
                queries_IGWEC = queries_INEC.to(dtype).unflatten(1, ctx.sizes[:2])
                both_IGWFC = torch.cat([queries_IGWEC, grad_IGWEC], dim=3)
                grads = keys.gradients(both_IGWFC, dots_IGWFPQ, slopes_IGWFPQ)
        return grad_queries_INEC.to(queries_INEC.dtype), None, None, *grads


class _Keys:
    """The normalised keys of every window, known by their levels, means and deviations: none is ever made."""

    def __init__(self, levels: Sequence[Level], mean_IGW1PQ: Tensor, rstd_IGW1PQ: Tensor) -> None:
        self.levels, self.mean_IGW1PQ, self.rstd_IGW1PQ = levels, mean_IGW1PQ, rstd_IGW1PQ
        self.channels = [level.channels for level in levels]

    @staticmethod
    def measured(levels: Sequence[Level], b_IGWEC: Tensor, eps: float) -> tuple[_Keys, Tensor]:
        """The keys, and on the way the products of ``b`` with them before they are normalised."""
        channels = [level.channels for level in levels]
        room = b_IGWEC.new_empty(max(level.numbers_at_work for level in levels))
        parts = zip(levels, b_IGWEC.split(channels, -1), strict=True)
        dots, means, squares = zip(*(level.measure(b, room) for level, b in parts), strict=True)
        total = sum(channels)
        mean_IGW1PQ = torch.stack([s * (c / total) for s, c in zip(means, channels, strict=True)]).sum(0)
        energy = torch.stack(
            [n + c * (s - mean_IGW1PQ).square() for n, s, c in zip(squares, means, channels, strict=True)]
        )
        rstd_IGW1PQ = (energy.sum(0) / total + eps).rsqrt()
        return _Keys(levels, mean_IGW1PQ, rstd_IGW1PQ), torch.stack(dots).sum(0)

    def normed(self, dots_IGWEPQ: Tensor, b_IGWEC: Tensor) -> Tensor:
        """Products of ``b`` with the normalised keys, from those with the keys as they are."""
        sums_IGWE11 = b_IGWEC.sum(-1)[..., None, None]
        return torch.addcmul(dots_IGWEPQ, self.mean_IGW1PQ, sums_IGWE11, value=-1) * self.rstd_IGW1PQ

    def dots(self, b_IGWEC: Tensor) -> Tensor:
        """Products of ``b`` with the keys of its own window: (I, G, W, E, P, Q)."""
        parts = zip(self.levels, b_IGWEC.split(self.channels, -1), strict=True)
        return self.normed(torch.stack([level.dots(b) for level, b in parts]).sum(0), b_IGWEC)

    def pool(self, weights_IGWEPQ: Tensor) -> Tensor:
        """Weighted sums of the keys of each window: (I, G, W, E, C)."""
        u_IGWEPQ = weights_IGWEPQ * self.rstd_IGW1PQ
        offset_IGWE = (u_IGWEPQ * self.mean_IGW1PQ).sum((-2, -1))
        out_IGWEC = u_IGWEPQ.new_empty(*u_IGWEPQ.shape[:4], sum(self.channels))
        for level, part in zip(self.levels, out_IGWEC.split(self.channels, -1), strict=True):
            level.pool(u_IGWEPQ, offset_IGWE, part)
        return out_IGWEC

    def gradients(
        self, both_IGWFC: Tensor, dots_IGWFPQ: Tensor, slopes_IGWFPQ: Tensor
    ) -> list[Tensor | None]:
        """Each level's gradient: LayerNorm's backward pass on a gradient of rank F, then interpolation's."""
        along_IGW1PQ = (slopes_IGWFPQ * dots_IGWFPQ).sum(3, keepdim=True) / sum(self.channels)
        bend_IGWPQ = (along_IGW1PQ * self.rstd_IGW1PQ.square()).squeeze(3)
        steep_IGWFPQ = slopes_IGWFPQ * self.rstd_IGW1PQ
        centred_IGWFC = both_IGWFC - both_IGWFC.mean(-1, keepdim=True)
        parts = zip(self.levels, centred_IGWFC.split(self.channels, -1), strict=True)
        mean_IGWPQ = self.mean_IGW1PQ.squeeze(3)
        return [level.gradient(b, steep_IGWFPQ, bend_IGWPQ, mean_IGWPQ) for level, b in parts]
