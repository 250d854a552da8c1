"""How evenly experts are loaded while they train, from counts that the balance loss makes anyway."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch

from vlmix.moe.balance import RoutingCounts
from vlmix.moe.recorder_tally import UNUSED

EVERY: Final = 10
"""Steps from one account to the next: often enough for a curve, and the counts leave the device seldom."""


def is_told(step: int, steps: int) -> bool:
    """Whether step ``step`` of ``steps``, from 1, gives an account."""
    return step % EVERY == 0 or step == steps


def expert_loads(counts: RoutingCounts | None) -> Mapping[str, Mapping[str, float]] | None:
    """By layer, of the choices of one step: ``most``, the largest share of one expert, ``unused``, how many
    experts had less than a tenth of their even share, and ``effective``, how many evenly loaded experts would
    be as varied. ``None`` where nothing was counted: layers that neither loss nor bias balances.
    """
    if counts is None or not counts.layers:
        return None
    return {layer: _figures(counts_GE.sum(0)) for layer, counts_GE in counts.layers.items()}


def _figures(counts_E: torch.Tensor) -> Mapping[str, float]:
    load_E = counts_E.double().cpu()
    share_E = load_E / load_E.sum().clamp_min(1)
    unused = int((share_E * len(share_E) < UNUSED).sum())
    effective = float(torch.special.entr(share_E).sum().exp())
    return {"most": float(share_E.max()), "unused": unused, "effective": effective}
