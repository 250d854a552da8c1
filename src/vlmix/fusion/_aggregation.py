"""Layers of the spatial vision aggregator (Cambrian-1, arXiv:2406.16860, 3.2): queries read windows of maps.

Two ways to read several encoders at once: their cells in one softmax, or each in its own, weighed afterwards.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import transformers.initialization as init
from jaxtyping import Bool, Float
from torch import Tensor, nn


class AggregatorLayer(nn.Module, ABC):
    """Every query reads its windows, then an MLP; the query's own path is never normed.

    ``query`` and ``context`` are their channels, ``width`` those inside, ``channels`` and ``cells`` of one
    window for every map.
    """

    def __init__(
        self, query: int, width: int, context: int, channels: Sequence[int], cells: Sequence[int]
    ) -> None:
        super().__init__()
        self.proj_context = nn.Linear(context, width, bias=False)
        self.proj_in = nn.Linear(query + width, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.mlp = _mlp(width, width, query)
        self.places = nn.ParameterDict(
            {
                str(i): nn.Parameter(torch.zeros(count, channels[i]))
                for i, count in enumerate(cells)
                if count > 1
            }
        )

    def reset(self) -> None:
        """Places within a window start as unit noise, as in the authors' code."""
        for place in self.places.values():
            init.normal_(place)

    def forward(
        self,
        query_INC: Float[Tensor, "i n c"],
        context_INC: Float[Tensor, "i n k"],
        windows: Sequence[Float[Tensor, "i n m c"]],
        masks: Sequence[Bool[Tensor, "i n m"] | None],
    ) -> Float[Tensor, "i n c"]:
        """One query for each window of every map; cells where a mask is false are not read."""
        context_INC = self.proj_context(context_INC).expand(*query_INC.shape[:2], -1)
        joined_INC = torch.cat((query_INC, context_INC), dim=-1)
        x_INC = self.proj_in(joined_INC)
        placed = [w + self.places[str(i)] if str(i) in self.places else w for i, w in enumerate(windows)]
        x_INC = x_INC + self.read(x_INC, joined_INC, placed, masks)
        return query_INC + self.mlp(self.norm(x_INC))

    @abstractmethod
    def read(
        self, x_INC: Tensor, joined_INC: Tensor, windows: Sequence[Tensor], masks: Sequence[Tensor | None]
    ) -> Tensor:
        """What the queries find in their windows."""


class JointLayer(AggregatorLayer):
    """The cells of all encoders in one softmax: the published models."""

    def __init__(
        self, query: int, width: int, context: int, channels: Sequence[int], cells: Sequence[int], heads: int
    ) -> None:
        super().__init__(query, width, context, channels, cells)
        self.heads = heads
        self.query = _norm_linear(width, width)
        self.keys = nn.ModuleList(_norm_linear(count, width) for count in channels)
        self.values = nn.ModuleList(_norm_linear(count, width) for count in channels)
        self.out = nn.Linear(width, width, bias=False)

    def read(
        self, x_INC: Tensor, joined_INC: Tensor, windows: Sequence[Tensor], masks: Sequence[Tensor | None]
    ) -> Tensor:
        """Attention over all windows' cells."""
        keys = torch.cat([key(w) for key, w in zip(self.keys, windows, strict=True)], dim=2)
        values = torch.cat([value(w) for value, w in zip(self.values, windows, strict=True)], dim=2)
        return self.out(attend(self.query(x_INC), keys, values, _joined(masks, windows), self.heads))


class _Reader(nn.Module):
    """Attention to one encoder's window."""

    def __init__(self, width: int, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = _norm_linear(width, width)
        self.key, self.value = _norm_linear(channels, width), _norm_linear(channels, width)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x_INC: Tensor, window_INMC: Tensor, mask_INM: Tensor | None) -> Tensor:
        """What the queries find there: (I, N, C)."""
        found = attend(
            self.query(x_INC), self.key(window_INMC), self.value(window_INMC), mask_INM, self.heads
        )
        return self.out(found)


class SeparateLayer(AggregatorLayer):
    """Each encoder in a softmax of its own, one with a single cell through an MLP; a softmax weighs them."""

    def __init__(
        self, query: int, width: int, context: int, channels: Sequence[int], cells: Sequence[int], heads: int
    ) -> None:
        super().__init__(query, width, context, channels, cells)
        self.weights = _mlp(query + width, width, len(cells))
        self.readers = nn.ModuleList(
            _Reader(width, count, heads) if inside > 1 else _mlp(count, width, width)
            for count, inside in zip(channels, cells, strict=True)
        )

    def read(
        self, x_INC: Tensor, joined_INC: Tensor, windows: Sequence[Tensor], masks: Sequence[Tensor | None]
    ) -> Tensor:
        """The weighed sum of what each encoder answers."""
        found = [
            reader(x_INC, window, mask) if isinstance(reader, _Reader) else reader(window.squeeze(2))
            for reader, window, mask in zip(self.readers, windows, masks, strict=True)
        ]
        weights_INK = self.weights(joined_INC).softmax(-1)
        return torch.einsum("inkc,ink->inc", torch.stack(found, dim=2), weights_INK)


def attend(
    query_INC: Tensor, keys_INMC: Tensor, values_INMC: Tensor, mask_INM: Tensor | None, heads: int
) -> Float[Tensor, "i n c"]:
    """Each query's attention to the keys of its own window, heads side by side in the channels."""

    def apart(x_INMC: Tensor) -> Tensor:
        return x_INMC.unflatten(-1, (heads, -1)).transpose(2, 3)

    shown = None if mask_INM is None else mask_INM[:, :, None, None]
    found = F.scaled_dot_product_attention(
        apart(query_INC.unsqueeze(2)), apart(keys_INMC), apart(values_INMC), attn_mask=shown
    )
    return found.transpose(2, 3).flatten(2)


def _joined(masks: Sequence[Tensor | None], windows: Sequence[Tensor]) -> Tensor | None:
    """One mask over the cells of all windows, or none where every cell counts."""
    if all(mask is None for mask in masks):
        return None
    whole = [
        w.new_ones(w.shape[:3], dtype=torch.bool) if m is None else m
        for m, w in zip(masks, windows, strict=True)
    ]
    return torch.cat(whole, dim=2)


def _norm_linear(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, width, bias=False))


def _mlp(channels: int, hidden: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(channels, hidden, bias=False), nn.GELU(), nn.Linear(hidden, width, bias=False)
    )
