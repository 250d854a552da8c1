"""Encoded conversations, and how several become one batch of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from vlmix.core.errors import PlanError
from vlmix.core.sample import ImageRef
from vlmix.models.losses import IGNORED

Side = Literal["left", "right"]


@dataclass(frozen=True, slots=True)
class Encoded:
    """One conversation as tokens: labels are -100 where nothing is learnt; pictures are not opened yet.

    ``images`` are those whose placeholders are in ``input_ids``; ``dropped_turns`` did not fit.
    ``instruction_ids`` are what the user said, where the model reads that.
    """

    input_ids: list[int]
    labels: list[int]
    images: tuple[ImageRef, ...] = ()
    dropped_turns: int = 0
    sample_id: str = ""
    instruction_ids: list[int] | None = None

    @property
    def length(self) -> int:
        """Tokens the language model reads, visual ones included."""
        return len(self.input_ids)

    @property
    def has_images(self) -> bool:
        """Whether encoders run for it."""
        return bool(self.images)


def padded_rows(encoded: Sequence[Encoded], pad_id: int, side: Side) -> dict[str, Tensor]:
    """A row for each conversation: words, mask, labels, and what the user said where that is read."""
    batch = pad_ids([item.input_ids for item in encoded], pad_id, side)
    batch["labels"] = pad_rows([item.labels for item in encoded], IGNORED, side)
    return batch | pad_instructions([item.instruction_ids for item in encoded], pad_id, side)


def packed_row(encoded: Sequence[Encoded]) -> dict[str, Tensor]:
    """All conversations in one row: ``input_ids``, ``labels`` and ``position_ids`` (1, T), and no padding.

    ``document_lengths`` (C,) are those of the conversations. Nothing predicts a conversation's first token.

    Raises:
        PlanError: if the model reads what the user said.

    """
    refuse_instructions(any(item.instruction_ids is not None for item in encoded))
    lengths = [item.length for item in encoded]
    labels = [label for item in encoded for label in (IGNORED, *item.labels[1:])]
    return {
        "input_ids": torch.tensor([[number for item in encoded for number in item.input_ids]]),
        "labels": torch.tensor([labels]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),
        "document_lengths": torch.tensor(lengths),
    }


def refuse_instructions(reads_instruction: bool) -> None:
    """Refuse to pack for a model that reads what the user said, once for each row.

    Raises:
        PlanError: if it does.

    """
    if reads_instruction:
        raise PlanError(
            "packing: the model decides by what the user said, once for each row of a batch, and a packed "
            "row holds several conversations. Leave `batching.pack` off, or take parts that read tokens"
        )


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


def pad_instructions(rows: Sequence[Sequence[int] | None], pad_id: int, side: Side) -> dict[str, Tensor]:
    """``instruction_ids`` and ``instruction_mask`` (B, U), or nothing where the model reads none."""
    told = [row for row in rows if row is not None]
    if not told:
        return {}
    found = pad_ids(told, pad_id, side)
    return {"instruction_ids": found["input_ids"], "instruction_mask": found["attention_mask"]}


def unpadded(coded: Sequence[list[int]], told: Sequence[list[int]]) -> dict[str, list[list[int]]]:
    """The same names with rows of their own lengths."""
    batch = {"input_ids": list(coded), "attention_mask": [[1] * len(ids) for ids in coded]}
    if not told:
        return batch
    masks = [[1] * len(ids) for ids in told]
    return {**batch, "instruction_ids": list(told), "instruction_mask": masks}


@dataclass(frozen=True, slots=True)
class Opened:
    """The pictures of one conversation as the model takes them.

    ``pixel_values`` (I, 3, S, S), or the views of all pictures with their ``image_tilings`` (I, 4) where
    pictures are cut; ``picture_values`` are then whole ones, where an encoder sees them. ``more`` goes along.
    """

    pixel_values: UInt8[Tensor, "v 3 s s"]
    image_tilings: Int64[Tensor, "i 4"] | None = None
    picture_values: UInt8[Tensor, "i 3 p p"] | None = None
    more: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    def along(self, more: Mapping[str, Tensor]) -> Opened:
        """The same with further tensors, a row or several for each picture."""
        return replace(self, more=more)

    def named(self) -> dict[str, Tensor]:
        """What there is, under the names of the model's arguments."""
        found = {
            "pixel_values": self.pixel_values,
            "image_tilings": self.image_tilings,
            "picture_values": self.picture_values,
        }
        return {name: value for name, value in found.items() if value is not None} | dict(self.more)


def join_pictures(opened: Iterable[Opened]) -> dict[str, Tensor]:
    """All pictures of a batch in order, or nothing where there is none: then no encoder runs."""
    shown = [each.named() for each in opened if each.pixel_values.shape[0]]
    return {name: torch.cat([each[name] for each in shown]) for name in (shown[0] if shown else ())}
