"""AdamW, in one fused kernel wherever torch has one for the device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import nn
from torch.optim import AdamW, Optimizer

from vlmix.train.optimizers import OPTIMIZERS
from vlmix.train.optimizers._base import OptimizerKind, OptimizerSettings, ParameterGroup


class AdamWSettings(OptimizerSettings):
    """``fused`` changes the last bits of an update, not what it is: off, torch's plain kernels run."""

    kind: Literal["adamw"] = "adamw"  # pyright: ignore[reportIncompatibleVariableOverride]
    fused: bool = True

    @model_validator(mode="before")
    @classmethod
    def _no_momentum(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """Recipes that runs wrote when AdamW and Muon shared their settings have Muon's, without effect."""
        if "momentum" in raw:
            raise ValueError(
                "`momentum` is Muon's, AdamW has `betas`. Remove it (an earlier version wrote it into the "
                "recipe.yaml of its runs, where it did nothing), or set `kind: muon`"
            )
        return raw

    @classmethod
    def tiny(cls) -> AdamWSettings:
        """The defaults."""
        return cls()


@OPTIMIZERS.register("adamw")
class AdamWKind(OptimizerKind):
    """torch's own. Paper: Loshchilov and Hutter, arXiv:1711.05101, algorithm 2."""

    settings_class = AdamWSettings

    def build(self, groups: Sequence[ParameterGroup], model: nn.Module) -> Optimizer:
        """One AdamW over all groups."""
        return adamw(groups, self.settings, fused=self.settings.fused)


def adamw(groups: Sequence[ParameterGroup], settings: OptimizerSettings, *, fused: bool = True) -> Optimizer:
    """AdamW over ``groups``, fused if asked and possible on every device they are on."""
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return AdamW(
        list(groups),
        betas=settings.betas,
        eps=settings.eps,
        fused=fused and all(has_fused(device) for device in devices),
    )


@cache
def has_fused(device: str) -> bool:
    """Whether torch has the fused kernel for this kind of device, found by using it."""
    weight = nn.Parameter(torch.zeros(1, device=device))
    weight.grad = torch.zeros_like(weight)
    try:
        AdamW([weight], fused=True).step()
    except RuntimeError:
        return False
    return True
