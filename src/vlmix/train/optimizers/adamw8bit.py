"""AdamW that keeps its moments in 8 bits: a quarter of the memory; needs the extra ``optim``.

Large matrices and convolutions go through bitsandbytes. Embedding tables and the output head, whose rows see
gradients of very different size, and everything small or one-dimensional keep torch's AdamW in 32 bits.
Paper: Dettmers et al., arXiv:2110.02861, sections 2 and 2.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import PositiveInt
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from vlmix.core.errors import PlanError
from vlmix.core.extras import extra
from vlmix.train.optimizers import OPTIMIZERS
from vlmix.train.optimizers._base import OptimizerKind, OptimizerSettings, ParameterGroup
from vlmix.train.optimizers._together import Together


class AdamW8bitSettings(OptimizerSettings):
    """``least`` is the number of weights from which a tensor's moments are kept in 8 bits."""

    kind: Literal["adamw8bit"] = "adamw8bit"  # pyright: ignore[reportIncompatibleVariableOverride]
    least: PositiveInt = 4096

    @classmethod
    def tiny(cls) -> AdamW8bitSettings:
        """Eight bits for every matrix that fills a block."""
        return cls(least=256)


@OPTIMIZERS.register("adamw8bit")
class AdamW8bitKind(OptimizerKind):
    """bitsandbytes' 8-bit AdamW beside torch's own."""

    settings_class = AdamW8bitSettings
    bytes_per_number = 2

    def build(self, groups: Sequence[ParameterGroup], model: nn.Module) -> Optimizer:
        """Two optimizers with one state.

        Raises:
            PlanError: if several processes divide the parameters.

        """
        if any(isinstance(parameter, DTensor) for group in groups for parameter in group["params"]):
            raise PlanError(
                "optimizer adamw8bit: its blocks of 256 weights cannot be divided among processes; use one "
                "process, or another optimizer"
            )
        with extra("optim", "optimizer adamw8bit"):
            from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
        settings = self.settings

        def matrices(chosen: list[ParameterGroup]) -> Optimizer:
            return AdamW8bit(chosen, betas=settings.betas, eps=settings.eps, min_8bit_size=settings.least)

        return Together(
            groups, model, settings, matrices=matrices, fits=lambda p: p.numel() >= settings.least
        )
