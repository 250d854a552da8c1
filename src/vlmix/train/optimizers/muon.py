"""Muon for the matrices inside the network and AdamW for everything else, as one optimizer.

Muon (K. Jordan, 2024) orthogonalises the momentum of a matrix before it is applied; torch has it for matrices
only. Embedding tables, the output head, convolutions, norms, biases, tables of positions and queries, and the
stacked matrices of experts keep AdamW. Muon's updates are scaled to the size AdamW's have (Liu et al.,
arXiv:2502.16982), so both work at the same learning rates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Muon, Optimizer

from vlmix.train.optimizers import OPTIMIZERS
from vlmix.train.optimizers._base import Fraction, OptimizerKind, OptimizerSettings, ParameterGroup
from vlmix.train.optimizers._together import Together
from vlmix.train.parallel.pieces import extent_of, local
from vlmix.train.parallel.sharding import whole

_SCALE = "match_rms_adamw"


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
            divided = any(isinstance(matrix, DTensor) for group in chosen for matrix in group["params"])
            kind = _DividedMuon if divided else Muon
            return kind(chosen, momentum=self.settings.momentum, adjust_lr_fn=_SCALE)

        # Tables of positions, queries and tokens have two dimensions too, but map nothing to anything.
        named = model.named_parameters(remove_duplicate=False)
        maps = {id(p) for name, p in named if p.ndim == 2 and name.endswith("weight")}
        return Together(groups, model, self.settings, matrices=matrices, fits=lambda p: id(p) in maps)


class _DividedMuon(Muon):
    """Muon over matrices of which each process holds some rows.

    An update depends on the whole matrix: each is gathered in turn and orthogonalised as on one process.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every matrix; all processes must ask. ``closure`` is not supported."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._update(matrix, matrix.grad, group)

    def _update(self, matrix: nn.Parameter, gradient: Tensor, group: ParameterGroup) -> None:
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        change = whole(gradient.lerp(state["momentum_buffer"], group["momentum"]))
        turned = nn.Parameter(torch.zeros_like(change, dtype=matrix.dtype))
        turned.grad = change
        # What is left of Muon without its memory.
        Muon([turned], group["lr"], 0.0, momentum=0.0, nesterov=False, adjust_lr_fn=_SCALE).step()
        extent = extent_of(matrix)
        rows = tuple(slice(a, a + n) for a, n in zip(extent.start, extent.size, strict=True))
        local(matrix).mul_(1 - group["lr"] * group["weight_decay"]).add_(turned[rows])
