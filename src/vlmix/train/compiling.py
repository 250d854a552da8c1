"""``torch.compile`` of the decoder's layers while a stage trains; names, hooks and checkpoints stay."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vlmix.train.parallel.sharding import outermost_layers


@contextmanager
def compiled_layers(decoder: nn.Module) -> Generator[None]:
    """Within the block each layer's own computation is compiled, and what is around it is not.

    What gathers a divided layer's weights, or runs it once more for gradients, is around it. The first steps
    take long; where lengths vary, one more compilation serves all further ones.
    """
    layers: list[Any] = list(outermost_layers(decoder))
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = torch.compile(layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward
