"""Matrix products in the precision in which they are fastest, where their own is not."""

from __future__ import annotations

import functools
import platform
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

# From this size on, converting both matrices costs less than it gains (measured: 20 to 50).
_LEAST: Final = 64


def multiply(a_MN: Tensor, b_NO: Tensor, out_MO: Tensor, bias_O: Tensor | None = None) -> None:
    """``a @ b + bias`` into ``out``; ``b`` and the bias are first rounded to the precision of ``a``."""
    b_NO, bias_O = b_NO.to(a_MN.dtype), None if bias_O is None else bias_O.to(a_MN.dtype)
    if in_float32(a_MN, b_NO.shape[1]):
        a_MN, b_NO, bias_O = a_MN.float(), b_NO.float(), None if bias_O is None else bias_O.float()
    out = out_MO if a_MN.dtype == out_MO.dtype else None
    y_MO = torch.mm(a_MN, b_NO, out=out) if bias_O is None else torch.addmm(bias_O, a_MN, b_NO, out=out)
    if out is None:
        out_MO.copy_(y_MO)


def linear(x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """The same for rows, with gradients: ``x @ weight.T + bias`` (R, O) in the precision of the rows."""
    weight_OI = weight_OI.to(x_RI.dtype)
    bias_O = None if bias_O is None else bias_O.to(x_RI.dtype)
    if in_float32(x_RI, len(weight_OI)):
        exact_RO = F.linear(x_RI.float(), weight_OI.float(), None if bias_O is None else bias_O.float())
        return exact_RO.to(x_RI.dtype)
    return F.linear(x_RI, weight_OI, bias_O)


def in_float32(x_MN: Tensor, width: int) -> bool:
    """Is the product of ``x`` and so many columns better made in float32?

    Larger ones of bfloat16 are, where a CPU multiplies float32 at twice the speed: the same numbers, rounded
    later.
    """
    if len(x_MN) < _LEAST or x_MN.dtype != torch.bfloat16:  # at once, for the one row of an answer
        return False
    return x_MN.device.type == "cpu" and min(*x_MN.shape, width) >= _LEAST and _lacks_matrix_units()


@functools.cache
def _lacks_matrix_units() -> bool:
    """Of x86 alone; others were not measured."""
    # The only name for it that the oldest supported torch has too.
    return platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_amx_tile_supported()
