"""Matrix products in the precision in which they are fastest, where their own is not."""

from __future__ import annotations

import functools
import platform
from typing import Final, overload

import torch
import torch.nn.functional as F
from torch import Tensor

# From this size on, converting both matrices costs less than it gains (measured: 20 to 50).
_LEAST: Final = 64


def multiply(a_MN: Tensor, b_NO: Tensor, out_MO: Tensor, bias_O: Tensor | None = None) -> None:
    """``a @ b + bias`` into ``out``; ``b`` and the bias are first rounded to the precision of ``a``."""
    dtype = _fastest(a_MN, b_NO.shape[1])
    b_NO, bias_O = _rounded(b_NO, a_MN.dtype, dtype), _rounded(bias_O, a_MN.dtype, dtype)
    out = out_MO if dtype == out_MO.dtype else None
    if bias_O is None:
        y_MO = torch.mm(a_MN.to(dtype), b_NO, out=out)
    else:
        y_MO = torch.addmm(bias_O, a_MN.to(dtype), b_NO, out=out)
    if out is None:
        out_MO.copy_(y_MO)


def linear(x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """The same for rows, with gradients: ``x @ weight.T + bias`` (R, O) in the precision of the rows."""
    dtype = _fastest(x_RI, len(weight_OI))
    weight_OI, bias_O = _rounded(weight_OI, x_RI.dtype, dtype), _rounded(bias_O, x_RI.dtype, dtype)
    return F.linear(x_RI.to(dtype), weight_OI, bias_O).to(x_RI.dtype)


@overload
def _rounded(weight: Tensor, rounded: torch.dtype, dtype: torch.dtype) -> Tensor: ...


@overload
def _rounded(weight: Tensor | None, rounded: torch.dtype, dtype: torch.dtype) -> Tensor | None: ...


def _rounded(weight: Tensor | None, rounded: torch.dtype, dtype: torch.dtype) -> Tensor | None:
    """A weight rounded to one precision, as autocast does, and given in another."""
    return None if weight is None else weight.to(rounded).to(dtype)


def _fastest(x_MN: Tensor, width: int) -> torch.dtype:
    """The precision in which to multiply ``x`` by so many columns.

    Larger products of bfloat16 are made in float32 where a CPU multiplies those at twice the speed: the same
    numbers, rounded later.
    """
    slow = x_MN.dtype == torch.bfloat16 and x_MN.device.type == "cpu" and _lacks_matrix_units()
    return torch.float32 if slow and min(*x_MN.shape, width) >= _LEAST else x_MN.dtype


@functools.cache
def _lacks_matrix_units() -> bool:
    """Of x86 alone; others were not measured."""
    # The only name for it that the oldest supported torch has too.
    return platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_amx_tile_supported()
