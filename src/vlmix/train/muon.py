"""Muon for the matrices inside the network and AdamW for everything else, as one optimizer.

Muon (K. Jordan, 2024) orthogonalises the momentum of a matrix before it is applied; torch has it for matrices
only. Embedding tables, the output head, convolutions, norms and biases keep AdamW. Muon's updates are scaled
to the size AdamW's have (Liu et al., arXiv:2502.16982), so both work at the same learning rates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from transformers import PreTrainedModel


class MuonWithAdamW(Optimizer):
    """One list of groups and one state over two optimizers, each stepping its own groups.

    ``groups`` are split where they hold both kinds of parameters; all keys of a group are kept.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        model: nn.Module,
        *,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        tables = _tables(model)
        super().__init__(
            [
                {**group, "params": chosen, "matrices": matrices}
                for group in groups
                for matrices in (True, False)
                if (chosen := [p for p in group["params"] if _inside(p, tables) == matrices])
            ],
            {},
        )
        inside = [group for group in self.param_groups if group["matrices"]]
        others = [group for group in self.param_groups if not group["matrices"]]
        self._members = list[Optimizer]()
        if inside:
            self._members.append(Muon(inside, momentum=momentum, adjust_lr_fn="match_rms_adamw"))
        if others:
            self._members.append(AdamW(others, betas=betas, eps=eps))
        for member in self._members:
            member.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Step both; ``closure`` is not supported."""
        if closure is not None:
            raise ValueError("MuonWithAdamW takes no closure")
        for member in self._members:
            member.step()


def _tables(model: nn.Module) -> set[int]:
    """Weights that are looked up by row, and the head that scores every row."""
    found = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return found if head is None else {*found, id(head.weight)}


def _inside(parameter: nn.Parameter, tables: set[int]) -> bool:
    return parameter.ndim == 2 and id(parameter) not in tables
