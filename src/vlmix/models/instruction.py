"""What the user asked, as one vector for each row, and how it reaches the parts that decide by it.

The vector is the mean of the language model's own embeddings of what the user said in all turns, without
template, answers and pictures. It is cut off the graph: what routes by it does not train the embeddings, so
they are frozen for it, as the sentence encoder of MoME is (arXiv:2407.12709; none comes with vlmix). Where a
stage trains the embeddings for other reasons, it moves along.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from vlmix.core.errors import InputError
from vlmix.core.sample import Turn
from vlmix.core.tape import instructed, instruction
from vlmix.core.tensors import TextContext
from vlmix.models.encoding import SegmentEncoder
from vlmix.models.rendering import Segment
from vlmix.models.viewing import pictures_of_rows


def instruction_tokens(encoder: SegmentEncoder, turns: Sequence[Turn]) -> list[int]:
    """What the user said in all turns as token ids: each turn by itself, as plain text."""
    said = [Segment("text", turn.text) for turn in turns if turn.role == "user" and turn.text]
    return [number for segment in said for number in encoder.encode([segment], add_bos=False)[0]]


def instruction_vectors(
    embeddings: nn.Module, ids_BU: Tensor | None, mask_BU: Tensor | None
) -> Tensor | None:
    """The mean of each row's embeddings (B, D) in float32, off the graph; 0 where nothing was said."""
    if ids_BU is None:
        return None
    mask_BU1 = (torch.ones_like(ids_BU) if mask_BU is None else mask_BU).float().unsqueeze(-1)
    with torch.no_grad():
        sums_BD = (embeddings(ids_BU).float() * mask_BU1).sum(1)
        return sums_BD / mask_BU1.sum(1).clamp_min(1)


def asked(
    embeddings: nn.Module, ids_BU: Tensor | None, mask_BU: Tensor | None
) -> AbstractContextManager[None]:
    """Inside the ``with`` parts may read this instruction; without ids, the one they could read before."""
    told_BD = instruction_vectors(embeddings, ids_BU, mask_BU)
    return instructed(instruction() if told_BD is None else told_BD)


def asked_shapes(width: int, rows: int) -> AbstractContextManager[None]:
    """The same with shapes and no data."""
    return instructed(torch.empty(rows, width, device="meta"))


def row_context(is_image_BT: Tensor, tokens: Sequence[int], views: Sequence[int]) -> TextContext | None:
    """The instruction of each row for all views of its pictures, whose ``tokens`` and ``views`` are given."""
    counts = iter(views)
    pictures = pictures_of_rows(is_image_BT.sum(1).tolist(), tokens)
    return _context([sum(islice(counts, row)) for row in pictures])


def picture_context(views: Sequence[int]) -> TextContext | None:
    """The same where the instruction has one row for each picture, or one for all.

    Raises:
        InputError: if it has another number of rows.

    """
    told_BD = instruction()
    if told_BD is None or len(told_BD) == len(views):
        return _context(views)
    if len(told_BD) != 1:
        raise InputError(
            f"{len(told_BD)} instructions for {len(views)} pictures. Give one for each, or one for all"
        )
    return _context([sum(views)])


def _context(views: Sequence[int]) -> TextContext | None:
    """One token for each view; ``views`` are those of each row of the instruction."""
    told_BD = instruction()
    if told_BD is None:
        return None
    counts_B = torch.tensor(views, device=told_BD.device)
    rows_V1D = told_BD.repeat_interleave(counts_B, 0, output_size=sum(views)).unsqueeze(1)
    return TextContext(rows_V1D, torch.ones(rows_V1D.shape[:2], dtype=torch.bool, device=told_BD.device))


def keeping_instruction(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """``checkpoint``, whose function finds the same instruction when it runs once more for its gradients.

    That happens in the backward pass, outside ``asked`` and perhaps in another thread.
    """

    def run(function: Callable[..., Any], *given: Any, **options: Any) -> Any:
        told_BD = instruction()

        def again(*arguments: Any, **named: Any) -> Any:
            with instructed(told_BD):
                return function(*arguments, **named)

        return checkpoint(again, *given, **options)

    return run
