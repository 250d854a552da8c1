"""Attention of few queries to their own window of a large map, without a second map of that size.

Shape letters beyond ``vlmix.core.tensors``: G W rows and columns of windows, P Q rows and columns of keys in
one window, so M = P * Q; V windows at work at once; E heads; F = 2 E.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmix.core.tensors import Grid

# Numbers at work at once: small enough for the cache of a CPU, large enough to fill an accelerator.
_STEP_CPU, _STEP_ELSEWHERE = 1 << 20, 1 << 27

_Slices = tuple[slice, slice]


def mine_windows(keys_INC: Tensor, queries_INEC: Tensor, grid: Grid, window: Grid, eps: float) -> Tensor:
    """Pool every window's normalised keys with the weights its queries give them.

    ``keys_INC`` fills ``grid * window`` positions in row-major order. ``queries_INEC`` holds E queries for
    each cell of ``grid``, in the space of the keys, scale included. With k the keys after a LayerNorm of
    constant ``eps`` without gain and bias, each query q gives sum_j softmax_j(q . k_j) k_j over its window:
    (I, N, E, C), computed and returned in float32 or wider.
    """
    pooled_INEC: Any = _MineWindows.apply(keys_INC, queries_INEC, (*grid, *window), eps)
    return pooled_INEC


class _MineWindows(torch.autograd.Function):
    """Keeps its inputs only; the backward pass normalises the keys once more, step by step."""

    @staticmethod
    def forward(
        ctx: Any, keys_INC: Tensor, queries_INEC: Tensor, sizes: tuple[int, ...], eps: float
    ) -> Tensor:
        ctx.save_for_backward(keys_INC, queries_INEC)
        ctx.sizes, ctx.eps = sizes, eps
        dtype = torch.promote_types(torch.promote_types(keys_INC.dtype, queries_INEC.dtype), torch.float32)
        pooled_INEC = queries_INEC.new_empty(queries_INEC.shape, dtype=dtype)
        queries_IGWEC, pooled_IGWEC = (t.unflatten(1, sizes[:2]) for t in (queries_INEC, pooled_INEC))
        with no_autocast(keys_INC):
            for at, keys_VMC in _steps(keys_INC, sizes, dtype):
                normed_VMC, _ = _normalise(keys_VMC, eps)
                query_VEC = queries_IGWEC[at].flatten(0, 2).to(dtype)
                weights_VEM = torch.softmax(query_VEC @ normed_VMC.mT, dim=-1)
                pooled_IGWEC[at] = (weights_VEM @ normed_VMC).view_as(pooled_IGWEC[at])
        return pooled_INEC

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_INEC: Tensor
    ) -> tuple[Tensor | None, ...]:
        keys_INC, queries_INEC = ctx.saved_tensors
        sizes, dtype = ctx.sizes, grad_INEC.dtype
        grad_keys_INC = torch.empty_like(keys_INC) if ctx.needs_input_grad[0] else None
        grad_queries_INEC = queries_INEC.new_empty(queries_INEC.shape)
        queries_IGWEC, grad_IGWEC, out_IGWEC = (
            t.unflatten(1, sizes[:2]) for t in (queries_INEC, grad_INEC, grad_queries_INEC)
        )
        with no_autocast(keys_INC):
            for at, keys_VMC in _steps(keys_INC, sizes, dtype):
                normed_VMC, rstd_VM1 = _normalise(keys_VMC, ctx.eps)
                both_VFC = torch.cat([queries_IGWEC[at].to(dtype), grad_IGWEC[at]], dim=3).flatten(0, 2)
                dots_VFM = both_VFC @ normed_VMC.mT
                slopes_VFM = slopes(dots_VFM)
                grad_VEC = slopes_VFM.chunk(2, dim=1)[0] @ normed_VMC
                out_IGWEC[at] = grad_VEC.view_as(out_IGWEC[at]).to(out_IGWEC.dtype)
                if grad_keys_INC is not None:
                    grad_VMC = _keys_gradient(normed_VMC, rstd_VM1, both_VFC, dots_VFM, slopes_VFM)
                    _windows(grad_keys_INC, sizes)[at] = grad_VMC.view_as(_windows(keys_INC, sizes)[at])
        return grad_keys_INC, grad_queries_INEC, None, None


def _normalise(keys_VMC: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    normed_VMC, _, rstd_VM1 = torch.native_layer_norm(keys_VMC, keys_VMC.shape[-1:], None, None, eps)
    return normed_VMC, rstd_VM1


def slopes(dots_VFM: Tensor) -> Tensor:
    """How much of each query (first half) and of each incoming gradient (second) flows to each key."""
    scores_VEM, pulls_VEM = dots_VFM.chunk(2, dim=1)
    weights_VEM = torch.softmax(scores_VEM, dim=-1)
    mean_VE1 = (weights_VEM * pulls_VEM).sum(-1, keepdim=True)
    return torch.cat([weights_VEM * (pulls_VEM - mean_VE1), weights_VEM], dim=1)


def _keys_gradient(
    normed_VMC: Tensor, rstd_VM1: Tensor, both_VFC: Tensor, dots_VFM: Tensor, slopes_VFM: Tensor
) -> Tensor:
    """LayerNorm's backward pass on a gradient of rank F, whose two means are known without forming it."""
    along_VM1 = (slopes_VFM * dots_VFM).sum(1).unsqueeze(-1) / normed_VMC.shape[-1]
    centred_VFC = both_VFC - both_VFC.mean(-1, keepdim=True)
    grad_VMC = (slopes_VFM.mT * rstd_VM1) @ centred_VFC
    return grad_VMC.addcmul_(normed_VMC, along_VM1 * rstd_VM1, value=-1)


def _windows(keys_INC: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """The map seen as windows: (I, G, W, P, Q, C)."""
    rows, columns, high, wide = sizes
    return keys_INC.unflatten(1, (rows, high, columns, wide)).transpose(2, 3)


def _steps(keys_INC: Tensor, sizes: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[_Slices, Tensor]]:
    """Images and rows of windows to work on next, with their keys laid out window by window (V, M, C)."""
    windows_IGWPQC = _windows(keys_INC, sizes)
    images, rows = windows_IGWPQC.shape[:2]
    limit = _STEP_CPU if keys_INC.device.type == "cpu" else _STEP_ELSEWHERE
    per_row = windows_IGWPQC[:1, :1].numel()
    rows_each = min(max(limit // max(per_row, 1), 1), rows)
    images_each = max(limit // max(per_row * rows, 1), 1)
    for image in range(0, images, images_each):
        for row in range(0, rows, rows_each):
            at = (slice(image, image + images_each), slice(row, row + rows_each))
            yield at, windows_IGWPQC[at].to(dtype).flatten(3, 4).flatten(0, 2)


def no_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """Keep products in the dtype they have here: autocast would round scores to half precision."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
