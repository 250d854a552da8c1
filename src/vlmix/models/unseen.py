"""Pictures that run through encoders, fusion and projector and that no conversation shows.

Several processes that share one model must run the same parts: one whose conversations have no picture runs
some all the same. Nothing comes of it, exactly: no state, loss, gradient or balance of experts changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from vlmix.core.interfaces import Fusion
from vlmix.core.tape import unrecorded
from vlmix.core.tensors import Routing, TextContext
from vlmix.core.views import Tiling
from vlmix.models.instruction import row_context
from vlmix.models.revisit import Revisit
from vlmix.models.viewing import Sight, Viewing


class Seeing(Protocol):
    """A model as far as its pictures go."""

    viewing: Viewing
    fusion: Fusion
    revisits: tuple[int, ...]

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        ...

    def see(
        self,
        pixel_values: Any,
        picture_values: Tensor | None,
        tilings: Sequence[Tiling],
        context: TextContext | None = None,
    ) -> Sight:
        """What becomes of pictures before the decoder."""
        ...


def nothing_of(
    model: Seeing,
    rows: int,
    pixel_values: Tensor,
    image_tilings: Tensor | None = None,
    picture_values: Tensor | None = None,
) -> tuple[Tensor, list[Routing]]:
    """A zero that has every vision parameter in its graph, with gradients that are zero.

    The routing beside it is what experts decided for these pictures. ``rows`` are those of the batch.
    """
    tilings = model.viewing.tilings(pixel_values, image_tilings)
    lengths = model.viewing.tokens(tilings)
    shown_BN = torch.zeros(rows, sum(lengths), dtype=torch.bool, device=model.device)
    shown_BN[0] = True  # what was said in the first row stands in, where parts decide by it
    context = row_context(shown_BN, lengths, model.viewing.counts(tilings))
    with unrecorded() as tape:
        seen = model.see(pixel_values, picture_values, tilings, context)
        tokens_1ND = seen.tokens.unsqueeze(0)
        again = Revisit(model.fusion, seen.fused.memory, shown_BN[:1], seen.order)
        for place in range(len(model.revisits)):
            tokens_1ND = again.apply(place, tokens_1ND)
    # Filled rather than multiplied: 0 times infinity is no number.
    return tokens_1ND.masked_fill(shown_BN[:1].unsqueeze(-1), 0).sum(), tape
