"""Settings of micro-batches: which samples of an optimizer step run together. No torch."""

from __future__ import annotations

from typing import Self

from pydantic import PositiveInt, model_validator

from vlmix.core.settings import Settings


class BatchingSettings(Settings):
    """How the samples of an optimizer step are put into micro-batches; the step's loss is the same for all.

    ``group`` puts samples of like length together, those without pictures apart. ``window`` steps share
    their samples, so that each gets samples of like length: useful where a step is a single micro-batch, but
    then a step no longer has rows of all lengths. ``tokens`` is what one micro-batch may hold, padding
    included, in place of the stage's ``micro_batch_size``; a sample that is longer runs alone. ``pack`` puts
    the samples of a micro-batch into one row without padding, none of them seeing another.
    """

    group: bool = True
    window: PositiveInt = 1
    tokens: PositiveInt | None = None
    pack: bool = False

    @model_validator(mode="after")
    def _packs_fill_a_budget(self) -> Self:
        if self.pack and self.tokens is None:
            raise ValueError(
                "pack needs `tokens`, the length of the rows to fill: two to four times max_length is usual"
            )
        if self.window > 1 and not self.group:
            raise ValueError("a window of several steps only serves to group their samples; set group: true")
        return self
