"""A stage's optimizer over its groups, and learning rates as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from vlmix.core.errors import RecipeError
from vlmix.core.optimization import ScheduleSettings
from vlmix.core.parts import read_part
from vlmix.train.optimizers import OPTIMIZERS
from vlmix.train.optimizers._base import AveragingOptimizer
from vlmix.train.parallel.sharding import divided_alike
from vlmix.train.recipe import Stage
from vlmix.train.trainable import Selection


def build_optimizer(selection: Selection, raw: Mapping[str, Any], model: nn.Module) -> Optimizer:
    """The optimizer a stage asks for by ``kind``; every group knows its glob and its peak learning rate.

    Raises:
        InputError: if it needs a package that is not installed.

    """
    settings: Any = read_part(OPTIMIZERS, raw, "optimizer")
    groups = [
        {
            "params": alike,
            "lr": group.learning_rate,
            "peak": group.learning_rate,
            "pattern": group.pattern,
            "decays": group.decay,
            "weight_decay": settings.weight_decay if group.decay else 0.0,
        }
        for group in selection.groups
        for alike in divided_alike(group.parameters.values())
    ]
    return OPTIMIZERS.get(settings.kind)(settings).build(groups, model)


def check_learning(stage: Stage, where: str) -> None:
    """Check that optimizer, schedule and averaging of a stage go together.

    Raises:
        RecipeError: if they do not.

    """
    kind = stage.optimizer["kind"]
    if not OPTIMIZERS.get(kind).averages:
        return
    if stage.schedule.kind != "constant":
        raise RecipeError(
            f"{where}.schedule: {kind} wants rates that stay at their peak after the warm-up: "
            f"`schedule: {{kind: constant}}`, not {stage.schedule.kind}"
        )
    if stage.ema is not None:
        raise RecipeError(f"{where}.ema: {kind} averages the weights itself; remove one of the two")


def hand_on(optimizer: Optimizer) -> None:
    """Put the weights in place that are to be used, where they are not those that train: a stage's result."""
    if isinstance(optimizer, AveragingOptimizer):
        optimizer.eval()


def set_rates(optimizer: Optimizer, factor: float) -> dict[str, float]:
    """Set every group's learning rate to ``factor`` times its peak, and return the highest of each glob."""
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
        rates[group["pattern"]] = max(group["lr"], rates.get(group["pattern"], 0.0))
    return rates


def warmup_steps(settings: ScheduleSettings, steps: int) -> int:
    """Steps of warm-up in a stage of ``steps`` steps."""
    if settings.warmup_steps is not None:
        return min(settings.warmup_steps, steps)
    return math.ceil(settings.warmup_share * steps)


def rate_factor(settings: ScheduleSettings, step: int, steps: int) -> float:
    """What the peak learning rate is multiplied by in step ``step`` (from 0) of a stage of ``steps`` steps.

    It rises linearly and reaches 1 in the last step of the warm-up, then falls to ``floor``: from there
    on, or with ``wsd`` over the last steps alone.
    """
    start = warmup_steps(settings, steps)
    if step < start:
        return (step + 1) / start
    if settings.kind == "constant":
        return 1.0
    shape = settings.kind
    if settings.kind == "wsd":
        start, shape = max(start, steps - math.ceil(settings.decay_share * steps)), settings.decay
    progress = max(0, step - start) / max(1, steps - start)
    fall = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "sqrt": 1 - math.sqrt(progress),
    }[shape]
    return settings.floor + (1 - settings.floor) * fall
