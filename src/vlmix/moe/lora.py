"""LoRA experts: each Linear of a network has a low-rank pair for every expert; one decision serves them all.

y = W x + scale * sum_k g_k B_k A_k x. Papers: LLaVA-MoLE, arXiv:2401.16160; Hu et al., arXiv:2106.09685.
"""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
import transformers.initialization as init
from torch import Tensor, nn

from vlmix.core.interfaces import Part
from vlmix.moe.structure import FeedForward, linear_weight


class LoraExperts(Part):
    """Low-rank pairs (A, B) on the Linears of a network, B zero at the start."""

    def __init__(self, network: nn.Module, shape: FeedForward, count: int, rank: int, scale: float) -> None:
        super().__init__()
        self.shape, self.scale, self.count = shape, scale, count
        names = [name for name in (shape.gate, shape.up, shape.down) if name is not None]
        self.slots = {name: slot for slot, name in enumerate(names)}
        weights = [linear_weight(network.get_submodule(name)) for name in names]
        self.down = nn.ParameterList([w.new_empty(count, rank, w.shape[1]) for w in weights])
        self.up = nn.ParameterList([w.new_empty(count, w.shape[0], rank) for w in weights])

    def reset(self) -> None:
        """A of variance one over its inputs, B zero."""
        for matrix in self.down:
            init.normal_(matrix, std=matrix.shape[-1] ** -0.5)
        for matrix in self.up:
            init.zeros_(matrix)

    def forward(self, network: nn.Module, x_TD: Tensor, shares_TE: Tensor) -> Tensor:
        """The network's output with the experts' products, by their shares, added in each Linear: (T, O)."""

        def linear(name: str, x: Tensor) -> Tensor:
            return network.get_submodule(name)(x) + self._product(name, x, shares_TE)

        shape = self.shape
        inner = linear(shape.up, x_TD)
        if shape.packed is not None:
            gate, inner = inner.chunk(2, -1) if shape.packed == "first" else inner.chunk(2, -1)[::-1]
            inner = shape.activation(gate) * inner
        elif shape.gate is not None:
            inner = shape.activation(linear(shape.gate, x_TD)) * inner
        else:
            inner = shape.activation(inner)
        return linear(shape.down, inner)

    def _product(self, name: str, x: Tensor, shares_TE: Tensor) -> Tensor:
        """All experts' A as one matrix and all B as another: the shares stand between them."""
        slot = self.slots[name]
        down, up = cast("Tensor", self.down[slot]), cast("Tensor", self.up[slot])
        inner_TER = F.linear(x, down.flatten(0, 1)).unflatten(-1, (self.count, -1))
        mixed = inner_TER * shares_TE.to(inner_TER.dtype).unsqueeze(-1)
        return F.linear(mixed.flatten(1), up.transpose(0, 1).flatten(1)) * self.scale
