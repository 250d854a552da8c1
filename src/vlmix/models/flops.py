"""torch's FLOP counter with what it leaves out or miscounts: grouped experts, depthwise convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

Shape = Sequence[int]


def flop_counter() -> FlopCounterMode:
    """A context that counts two FLOPs per multiply-add; ask it for ``get_total_flops()``."""
    aten = torch.ops.aten
    counted = {aten.convolution_backward: _convolution_backward, aten._grouped_mm: _grouped_mm}
    return FlopCounterMode(display=False, custom_mapping=counted)


def _grouped_mm(a_shape: Shape, b_shape: Shape, *_: Any, **__: Any) -> int:
    """Each row meets the weights of its own group: as one product with a group's weights."""
    return 2 * a_shape[-2] * a_shape[-1] * b_shape[-1]


def _convolution_backward(grad_shape: Shape, x_shape: Shape, w_shape: Shape, *others: Any, **_: Any) -> int:
    """As much as the forward pass for each gradient that is asked for.

    torch's own count takes a depthwise convolution's weights for those of a dense one.
    """
    transposed, output_mask = others[4], others[7]
    forward = conv_flop_count(list(x_shape), list(w_shape), list(grad_shape), transposed)
    return forward * sum(output_mask[:2])
