"""All encoders' tokens one after another: nothing is resampled, the sequence grows with every encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import torch
from pydantic import PositiveInt
from torch import nn

from vlmix.core.errors import PlanError
from vlmix.core.interfaces import LateFusion
from vlmix.core.parts import FUSIONS
from vlmix.core.settings import PartSettings
from vlmix.core.tensors import FeatureMap, TextContext, VisionSpec


class SequenceAppendSettings(PartSettings):
    """``order``: each encoder's tokens together, or one token of each in turn.

    ``width`` gives every encoder a Linear to that many channels; without it their channels must be equal.
    """

    kind: Literal["sequence_append"] = "sequence_append"  # pyright: ignore[reportIncompatibleVariableOverride]
    order: Literal["by_encoder", "interleaved"] = "by_encoder"
    width: PositiveInt | None = None

    @classmethod
    def tiny(cls) -> Self:
        """A Linear for each encoder."""
        return cls(width=12)


@FUSIONS.register("sequence_append")
class SequenceAppend(LateFusion):
    """Gives a strip of tokens, which has no rectangle."""

    settings_class = SequenceAppendSettings

    def __init__(self, settings: SequenceAppendSettings, specs: Sequence[VisionSpec]) -> None:
        super().__init__()
        self.interleaved = settings.order == "interleaved"
        self.linears = nn.ModuleList(
            nn.Identity() if settings.width is None else nn.Linear(spec.channels, settings.width)
            for spec in specs
        )

    @classmethod
    def plan(cls, settings: SequenceAppendSettings, specs: Sequence[VisionSpec]) -> VisionSpec:
        """A strip of all tokens.

        Raises:
            PlanError: if channels differ and no width is set, or token counts differ and are interleaved.

        """
        channels, tokens = [spec.channels for spec in specs], [spec.tokens for spec in specs]
        if settings.width is None and len({*channels}) != 1:
            raise PlanError(
                f"sequence_append: the encoders give {channels} channels; set `width` to bring them to one"
            )
        if settings.order == "interleaved" and len({*tokens}) != 1:
            raise PlanError(
                f"sequence_append: tokens can only take turns if every encoder gives as many, not {tokens}; "
                "choose sizes that agree or `order: by_encoder`"
            )
        return VisionSpec((1, sum(tokens)), settings.width or channels[0])

    def merge(self, maps: Sequence[FeatureMap], context: TextContext | None = None) -> FeatureMap:
        """Join the tokens."""
        parts = [linear(m.tokens) for linear, m in zip(self.linears, maps, strict=True)]
        joined_INC = torch.stack(parts, dim=2).flatten(1, 2) if self.interleaved else torch.cat(parts, dim=1)
        return FeatureMap(joined_INC, (1, joined_INC.shape[1]))
