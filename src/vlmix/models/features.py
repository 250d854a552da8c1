"""Pictures as frozen encoders saw them: what fusions are shown where encoders need not run again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Self, cast

import torch
from torch import Tensor, nn

from vlmix.core.interfaces import VisionEncoder
from vlmix.core.tensors import FeatureMap
from vlmix.core.views import Views

Maps = tuple[FeatureMap, ...]
"""What one encoder gave for some pictures: its map, or its levels; nothing if the fusion does not ask it."""


_ALIGNED = 64  # bytes: as torch allocates; some kernels do otherwise on other addresses


@dataclass(frozen=True, slots=True)
class SeenPictures:
    """What each encoder gave for all pictures of a batch; stands for ``pixel_values`` in a model's arguments.

    ``maps`` are by encoder. ``rows`` of pixels, views or pictures, it would be.
    """

    maps: tuple[Maps, ...]
    rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        """As that of pixels, which have no side here."""
        return (self.rows, 3, 0, 0)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The same on another device."""
        return self._each(lambda tokens_INC: tokens_INC.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same in memory from which an accelerator copies fast."""
        return self._each(Tensor.pin_memory)

    def isfinite(self) -> Tensor:
        """Whether each map holds finite numbers alone."""
        return torch.stack([found.tokens.isfinite().all() for maps in self.maps for found in maps])

    def encoders(self) -> list[VisionEncoder]:
        """What a fusion runs in place of the encoders."""
        return [cast("VisionEncoder", SeenEncoder(maps)) for maps in self.maps]

    def blank(self) -> Tensor:
        """Pixels without a side, for a fusion to hand to its encoders."""
        return torch.empty(self.shape, dtype=torch.uint8)

    def laid_out(self, strides: Sequence[Sequence[tuple[int, ...]]]) -> Self:
        """The same numbers in memory as the encoders themselves leave them, so that kernels do the same.

        ``strides`` are those of each encoder's maps for two or more views.
        """
        maps = tuple(
            tuple(FeatureMap(_laid_out(x.tokens, stride), x.grid) for x, stride in zip(*both, strict=True))
            for both in zip(self.maps, strides, strict=True)
        )
        return replace(self, maps=maps)

    def split(self, rows: Sequence[Sequence[int]]) -> list[tuple[Maps, ...]]:
        """The maps of each picture, which has as many rows of encoder i as ``rows[i]`` says, in order."""
        cut = [
            [tuple(_part(found, *ends) for found in maps) for ends in pairwise(accumulate(counts, initial=0))]
            for maps, counts in zip(self.maps, rows, strict=True)
        ]
        return list(zip(*cut, strict=True))

    @staticmethod
    def joined(pictures: Sequence[tuple[Maps, ...]], rows: int) -> SeenPictures:
        """Several pictures' maps, as ``split`` gives them, as one batch."""
        encoders = zip(*pictures, strict=True)
        return SeenPictures(tuple(_stacked(maps) for maps in encoders), rows)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        maps = tuple(tuple(FeatureMap(change(x.tokens), x.grid) for x in maps) for maps in self.maps)
        return replace(self, maps=maps)


class SeenEncoder:
    """Stands in a fusion for an encoder that has run already."""

    def __init__(self, maps: Maps) -> None:
        self.maps = maps

    def __call__(self, pixel_values: Tensor) -> FeatureMap:
        """The map it gave."""
        (found,) = self.maps
        return found

    def levels(self, pixel_values: Tensor) -> list[FeatureMap]:
        """The levels it gave."""
        return list(self.maps)


def shown_to(
    encoders: Iterable[nn.Module], views: Views, pixel_values: Tensor | SeenPictures, pictures: Tensor | None
) -> tuple[list[VisionEncoder], Tensor, Tensor | None]:
    """The encoders with the views and whole pictures they run on; those that ran already need neither."""
    if isinstance(pixel_values, SeenPictures):
        return pixel_values.encoders(), pixel_values.blank(), pixel_values.blank()
    return [cast("VisionEncoder", encoder) for encoder in encoders], views.spread(pixel_values), pictures


def _laid_out(tokens_INC: Tensor, stride: tuple[int, ...]) -> Tensor:
    shape, kind = tokens_INC.shape, {"dtype": tokens_INC.dtype, "device": tokens_INC.device}
    order = sorted(range(len(stride)), key=lambda axis: -stride[axis])
    # Views behind one another have that stride in any number; otherwise it changes with their number.
    apart = order[0] == 0
    like = torch.empty_strided(shape, stride, **kind) if apart else torch.empty_permuted(shape, order, **kind)
    if tokens_INC.stride() == like.stride() and tokens_INC.data_ptr() % _ALIGNED == 0:
        return tokens_INC
    return like.copy_(tokens_INC)


def _part(found: FeatureMap, start: int, end: int) -> FeatureMap:
    return FeatureMap(found.tokens[start:end], found.grid)


def _stacked(pictures: Sequence[Maps]) -> Maps:
    levels = zip(*pictures, strict=True)
    return tuple(FeatureMap(torch.cat([x.tokens for x in level]), level[0].grid) for level in levels)
