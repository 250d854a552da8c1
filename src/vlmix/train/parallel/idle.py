"""What a process runs where others have samples, or pictures, and it has none: nothing comes of it.

Processes that divide one model gather its weights together, so all must run the same parts in each round.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlmix.core.sample import ImageRef, Sample, Turn
from vlmix.train.reading import IGNORED, SampleEncoder
from vlmix.train.recipe import Stage

_PIXELS = "pixel_values"


class Idle:
    """Fills rounds up, with a blank picture and a word nobody learns from."""

    def __init__(self, encoder: SampleEncoder) -> None:
        side = encoder.processor.image_processor.image_size
        self._pictured = _unlearnt(encoder, (ImageRef(Image.new("RGB", (side, side))), "a"))
        self._text = _unlearnt(encoder, ("a",))
        self._pictures = {name: value for name, value in self._pictured.items() if name not in self._text}

    def filled(
        self, batches: Sequence[Mapping[str, Tensor] | None], pictured: Sequence[bool]
    ) -> Iterator[Mapping[str, Any]]:
        """One micro-batch for each round, with pictures in those that are ``pictured`` on some process.

        The last one is, where any is: gradients of what sees pictures are summed with it.
        """
        for number, batch in enumerate(batches):
            shown = pictured[number] or (number == len(batches) - 1 and any(pictured))
            if batch is None:
                yield self._pictured if shown else self._text
            elif shown and _PIXELS not in batch:
                yield {**batch, **self._pictures, "unseen_pictures": True}
            else:
                yield batch


def idle_notes(stages: Iterable[Stage], world: int) -> Iterator[str]:
    """Which stages have fewer micro-batches in a step than there are processes, by what they say alone."""
    for stage in stages:
        size = stage.micro_batch_size or stage.batch_size
        count = math.ceil(stage.batch_size / size)
        if stage.batching.tokens is None and count < world:
            yield (
                f"stage {stage.name}: {stage.batch_size} samples a step in micro-batches of {size} are "
                f"{count} for {world} processes, so that some idle; set micro_batch_size to "
                f"{max(1, stage.batch_size // world)} or less"
            )


def _unlearnt(encoder: SampleEncoder, parts: tuple[ImageRef | str, ...]) -> dict[str, Tensor]:
    sample = Sample("idle", (Turn("user", parts), Turn("assistant", ("a",))))
    encoded = encoder.encode(sample)
    batch = encoder.collate([encoded], [encoder.open(encoded)])
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    if "attention_mask" in batch:
        # One position, for attention needs one; experts are balanced over those that count.
        batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
        batch["attention_mask"][:, 0] = 1
    return batch
