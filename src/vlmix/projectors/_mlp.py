"""A stack of Linear layers with exact GELU between them."""

from __future__ import annotations

from itertools import pairwise

from torch import nn


def mlp(inputs: int, hidden: int, outputs: int, depth: int, *, bias: bool = True) -> nn.Sequential:
    """``depth`` Linear layers at the even positions, GELU at the odd ones: LLaVA's ``mlp{depth}x_gelu``."""
    widths = [inputs, *[hidden] * (depth - 1), outputs]
    linears = [nn.Linear(before, after, bias=bias) for before, after in pairwise(widths)]
    layers = [layer for linear in linears for layer in (linear, nn.GELU())]
    return nn.Sequential(*layers[:-1])
