"""Initial weights for parts that are trained from scratch, at any width."""

from __future__ import annotations

import transformers.initialization as init
from torch import nn


def fan_in(module: nn.Module) -> None:
    """Draw every Linear and convolution below ``module`` with variance one over its inputs; biases are 0.

    transformers' usual constant of 0.02 suits widths near a thousand. A part of width 64 that starts so
    passes on a tenth of what it reads and takes thousands of steps to wake up. Weights that came from a
    checkpoint are left alone.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            init.trunc_normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
            if layer.bias is not None:
                init.zeros_(layer.bias)
