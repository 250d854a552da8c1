"""A stage's optimizer over its groups, and learning rates as a pure function of the step."""

from __future__ import annotations

import math

from torch import nn
from torch.optim import AdamW, Optimizer

from vlmix.train.muon import MuonWithAdamW
from vlmix.train.recipe import OptimizerSettings, ScheduleSettings
from vlmix.train.trainable import Selection


def build_optimizer(selection: Selection, settings: OptimizerSettings, model: nn.Module) -> Optimizer:
    """The optimizer a stage asks for; every group knows its glob and its peak learning rate."""
    groups = [
        {
            "params": list(group.parameters.values()),
            "lr": group.learning_rate,
            "peak": group.learning_rate,
            "pattern": group.pattern,
            "weight_decay": settings.weight_decay if group.decay else 0.0,
        }
        for group in selection.groups
    ]
    if settings.kind == "muon":
        return MuonWithAdamW(
            groups, model, momentum=settings.momentum, betas=settings.betas, eps=settings.eps
        )
    return AdamW(groups, betas=settings.betas, eps=settings.eps)


def set_rates(optimizer: Optimizer, factor: float) -> dict[str, float]:
    """Set every group's learning rate to ``factor`` times its peak, and return the rates by glob."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    return {group["pattern"]: group["lr"] for group in optimizer.param_groups}


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
