"""Muon for the matrices inside the network and AdamW for everything else, as one optimizer.

Muon (K. Jordan, 2024) orthogonalises the momentum of a matrix before it is applied; torch has it for matrices
only. Embedding tables, the output head, convolutions, norms and biases keep AdamW. Muon's updates are scaled
to the size AdamW's have (Liu et al., arXiv:2502.16982), so both work at the same learning rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn
from torch.optim import Muon, Optimizer

from vlmix.train.optimizers import OPTIMIZERS
from vlmix.train.optimizers._base import Fraction, OptimizerKind, OptimizerSettings, ParameterGroup
from vlmix.train.optimizers._together import Together


class MuonSettings(OptimizerSettings):
    """``momentum`` is Muon's, ``betas`` and ``eps`` are AdamW's; both take the rates that AdamW would."""

    kind: Literal["muon"] = "muon"  # pyright: ignore[reportIncompatibleVariableOverride]
    momentum: Fraction = 0.95

    @classmethod
    def tiny(cls) -> MuonSettings:
        """The defaults."""
        return cls()


@OPTIMIZERS.register("muon")
class MuonKind(OptimizerKind):
    """torch's Muon beside torch's AdamW."""

    settings_class = MuonSettings

    def build(self, groups: Sequence[ParameterGroup], model: nn.Module) -> Optimizer:
        """Two optimizers with one state."""

        def matrices(chosen: list[ParameterGroup]) -> Optimizer:
            return Muon(chosen, momentum=self.settings.momentum, adjust_lr_fn="match_rms_adamw")

        return Together(groups, model, self.settings, matrices=matrices, fits=lambda p: p.ndim == 2)
