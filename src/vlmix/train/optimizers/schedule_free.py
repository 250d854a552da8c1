"""AdamW without a schedule: the weights to use are an average over all steps; needs the extra ``optim``.

The stage trains at one point and hands on another: checkpoints on the way hold the first, the last one and
the published model the second. Wants ``schedule: {kind: constant}``, whose warm-up counts.
Paper: Defazio et al., arXiv:2405.15682, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn
from torch.optim import Optimizer

from vlmix.core.extras import extra
from vlmix.train.optimizers import OPTIMIZERS
from vlmix.train.optimizers._base import OptimizerKind, OptimizerSettings, ParameterGroup

_REMEMBERED = ("k", "weight_sum", "lr_max")


class ScheduleFreeSettings(OptimizerSettings):
    """The first of ``betas`` says how far gradients are taken from the average: 0 at the newest point."""

    kind: Literal["schedule_free"] = "schedule_free"  # pyright: ignore[reportIncompatibleVariableOverride]

    @classmethod
    def tiny(cls) -> ScheduleFreeSettings:
        """The defaults."""
        return cls()


@OPTIMIZERS.register("schedule_free")
class ScheduleFreeKind(OptimizerKind):
    """The authors' own AdamW."""

    settings_class = ScheduleFreeSettings
    averages = True

    def build(self, groups: Sequence[ParameterGroup], model: nn.Module) -> Optimizer:
        """In training mode; its groups count steps and add up their weights."""
        with extra("optim", "optimizer schedule_free"):
            from schedulefree import AdamWScheduleFree
        remembering = [{**group, "remembers": _REMEMBERED} for group in groups]
        optimizer = AdamWScheduleFree(remembering, betas=self.settings.betas, eps=self.settings.eps)
        optimizer.train()
        return optimizer
