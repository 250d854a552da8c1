"""What a forward pass costs: cross entropy of the next token over the positions that were kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


def supervised_positions(labels: Tensor | None) -> Tensor:
    """Positions whose next token is a label in at least one row, and the last one if there is none."""
    if labels is None:
        raise ValueError("logits_to_keep='supervised' needs labels")
    kept = (labels[:, 1:] != IGNORED).any(0).nonzero().squeeze(1)
    return kept if kept.numel() else torch.tensor([labels.shape[1] - 1], device=labels.device)


def supervised_share(labels_BT: Tensor, items: Tensor | int | None) -> Tensor | float:
    """The share of a step's supervised tokens, ``items`` of them, that this micro-batch has."""
    return 1.0 if items is None else (labels_BT[:, 1:] != IGNORED).sum() / items


def next_token_loss(
    logits_BKV: Tensor, labels_BT: Tensor, kept: int | Tensor, items: Tensor | int | None
) -> Tensor:
    """Cross entropy of each kept position with the label after it, in float32, divided by ``items``."""
    after_BT = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)
    if isinstance(kept, Tensor):
        after_BT = after_BT[:, kept]
    elif kept:
        after_BT = after_BT[:, -kept:]
    total = F.cross_entropy(
        logits_BKV.float().flatten(0, 1), after_BT.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / ((after_BT != IGNORED).sum() if items is None else items)
