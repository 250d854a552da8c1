"""AdamW over a stage's groups, and learning rates as a pure function of the step."""

from __future__ import annotations

import math

from torch.optim import AdamW

from vlmix.train.recipe import OptimizerSettings, ScheduleSettings
from vlmix.train.trainable import Selection


def build_optimizer(selection: Selection, settings: OptimizerSettings) -> AdamW:
    """AdamW with one group for each of the selection's groups, in their order."""
    groups = [
        {
            "params": list(group.parameters.values()),
            "lr": group.learning_rate,
            "weight_decay": settings.weight_decay if group.decay else 0.0,
        }
        for group in selection.groups
    ]
    return AdamW(groups, betas=settings.betas, eps=settings.eps)


def set_rates(optimizer: AdamW, selection: Selection, factor: float) -> dict[str, float]:
    """Set every group's learning rate to ``factor`` times its peak, and return the rates by glob."""
    rates: dict[str, float] = {}
    for group, chosen in zip(optimizer.param_groups, selection.groups, strict=True):
        group["lr"] = rates[chosen.pattern] = chosen.learning_rate * factor
    return rates


def warmup_steps(settings: ScheduleSettings, steps: int) -> int:
    """Steps of warm-up in a stage of ``steps`` steps."""
    if settings.warmup_steps is not None:
        return min(settings.warmup_steps, steps)
    return math.ceil(settings.warmup_share * steps)


def rate_factor(settings: ScheduleSettings, step: int, steps: int) -> float:
    """What the peak learning rate is multiplied by in step ``step`` (from 0) of a stage of ``steps`` steps.

    It rises linearly and reaches 1 in the last step of the warm-up, then falls to ``floor``.
    """
    warmup = warmup_steps(settings, steps)
    if step < warmup:
        return (step + 1) / warmup
    if settings.kind == "constant":
        return 1.0
    progress = (step - warmup) / max(1, steps - warmup)
    fall = 0.5 * (1 + math.cos(math.pi * progress)) if settings.kind == "cosine" else 1 - progress
    return settings.floor + (1 - settings.floor) * fall
