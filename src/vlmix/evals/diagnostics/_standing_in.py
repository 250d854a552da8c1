"""Encoders whose maps are read or shut off on their way into the fusion; the model itself stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from vlmix.core.interfaces import VisionEncoder
from vlmix.core.tensors import FeatureMap, VisionSpec
from vlmix.fusion.channel_concat import ChannelConcat

if TYPE_CHECKING:
    from vlmix.models.modeling import VlmixModel

Change = Callable[[list[FeatureMap]], list[FeatureMap]]
"""What one encoder gave, its map or its levels -> what the fusion gets instead."""


class StandIn:
    """Stands in a fusion for an encoder, which runs as ever, and changes what it gives."""

    def __init__(self, encoder: VisionEncoder, change: Change) -> None:
        self.encoder, self.change = encoder, change

    @property
    def spec(self) -> VisionSpec:
        """The encoder's own."""
        return self.encoder.spec

    def __call__(self, pixel_values: Tensor) -> FeatureMap:
        """Its map, changed."""
        return self.change([self.encoder(pixel_values)])[0]

    def levels(self, pixel_values: Tensor) -> list[FeatureMap]:
        """Its levels, changed together."""
        return self.change(self.encoder.levels(pixel_values))

    def embed(self, pixel_values: Tensor) -> Tensor:
        """The encoder's own stem."""
        return self.encoder.embed(pixel_values)

    def block(self, index: int, x: Tensor) -> Tensor:
        """The encoder's own block."""
        return self.encoder.block(index, x)

    def finish(self, x: Tensor) -> FeatureMap:
        """Its map, changed, where a fusion ran it block by block."""
        return self.change([self.encoder.finish(x)])[0]


@contextmanager
def changed(model: VlmixModel, changes: dict[int, Change]) -> Generator[None]:
    """Inside the ``with`` the fusion gets changed maps from these encoders, counted from 0."""

    def enter(fusion: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        encoders, *rest = given
        shown = [
            StandIn(encoder, changes[number]) if number in changes else encoder
            for number, encoder in enumerate(cast("Sequence[VisionEncoder]", encoders))
        ]
        return (shown, *rest)

    handle = model.fusion.register_forward_pre_hook(enter)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def masked(model: VlmixModel, lost: Collection[int]) -> Generator[None]:
    """Inside the ``with`` these encoders, counted from 0, give zeros.

    The zeros stand where the finished map (or each of its levels) enters the fusion. ``channel_concat`` is
    the exception: there they stand behind the encoder's norm, where ``encoder_dropout`` puts them in
    training and where ``--drop-encoder`` cuts, because a LayerNorm would turn zeros into its bias.
    """
    fusion = model.fusion
    if not isinstance(fusion, ChannelConcat):
        with changed(model, dict.fromkeys(lost, _zeros)):
            yield
        return
    with ExitStack() as hooks:
        for number in lost:
            norm = cast("nn.ModuleList", fusion.norms)[number]
            hooks.callback(norm.register_forward_hook(_nothing).remove)
        yield


def _zeros(maps: list[FeatureMap]) -> list[FeatureMap]:
    return [replace(found, tokens=torch.zeros_like(found.tokens)) for found in maps]


def _nothing(module: Any, given: Any, found: Tensor) -> Tensor:
    return torch.zeros_like(found)


def whole_map(maps: Sequence[FeatureMap], spec: VisionSpec) -> FeatureMap:
    """The map that levels are parts of, stacked on the finest grid; a map that came whole is that map."""
    if len(maps) == 1:
        return maps[0]
    tokens = [level.resampled(spec.grid).tokens for level in maps]
    return FeatureMap(torch.cat(tokens, dim=-1), spec.grid)
