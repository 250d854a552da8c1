"""Encoded conversations, and how several become one batch of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int64
from torch import Tensor

from vlmix.core.sample import ImageRef

Side = Literal["left", "right"]


@dataclass(frozen=True, slots=True)
class Encoded:
    """One conversation as tokens: labels are -100 where nothing is learnt; pictures are not opened yet.

    ``images`` are those whose placeholders are in ``input_ids``; ``dropped_turns`` did not fit.
    """

    input_ids: list[int]
    labels: list[int]
    images: tuple[ImageRef, ...] = ()
    dropped_turns: int = 0
    sample_id: str = ""


def pad_rows(rows: Sequence[Sequence[int]], value: int, side: Side) -> Int64[Tensor, "b t"]:
    """Rows of token ids as one tensor, filled with ``value`` on ``side`` up to the longest."""
    length = max(map(len, rows), default=0)
    out_BT = torch.full((len(rows), length), value, dtype=torch.int64)
    for row_T, ids in zip(out_BT, rows, strict=True):
        start = length - len(ids) if side == "left" else 0
        row_T[start : start + len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return out_BT


def pad_ids(coded: Sequence[Sequence[int]], pad_id: int, side: Side) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` (B, T); the mask is 0 on padding."""
    ones = [[1] * len(ids) for ids in coded]
    return {"input_ids": pad_rows(coded, pad_id, side), "attention_mask": pad_rows(ones, 0, side)}


def join_pixels(opened: Iterable[Tensor]) -> dict[str, Tensor]:
    """``pixel_values`` of a batch in order, or nothing where there is no picture: then no encoder runs."""
    pixels = [pixels_I3SS for pixels_I3SS in opened if pixels_I3SS.shape[0]]
    return {"pixel_values": torch.cat(pixels)} if pixels else {}
