"""A stack of Linear layers with exact GELU between them."""

from __future__ import annotations

from itertools import pairwise

from torch import nn


def mlp(inputs: int, hidden: int, outputs: int, depth: int) -> nn.Sequential:
    """``depth`` Linear layers at the even positions, GELU at the odd ones: LLaVA's ``mlp{depth}x_gelu``."""
    widths = [inputs, *[hidden] * (depth - 1), outputs]
    layers = [layer for before, after in pairwise(widths) for layer in (nn.Linear(before, after), nn.GELU())]
    return nn.Sequential(*layers[:-1])
