"""Two optimizers as one: one for the matrices inside the network, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from vlmix.train.optimizers._base import OptimizerSettings, ParameterGroup
from vlmix.train.optimizers.adamw import adamw

Make = Callable[[list[ParameterGroup]], Optimizer]


class Together(Optimizer):
    """One list of groups and one state over two optimizers, each stepping its own groups.

    ``matrices`` makes the one for what ``fits``, of what is decayed and neither embedding table nor head;
    groups are split where they hold both kinds of parameters, and all their keys are kept.
    """

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        model: nn.Module,
        settings: OptimizerSettings,
        *,
        matrices: Make,
        fits: Callable[[nn.Parameter], bool],
    ) -> None:
        tables = _tables(model)

        def inside(parameter: nn.Parameter) -> bool:
            return id(parameter) not in tables and fits(parameter)

        super().__init__(
            [
                {**group, "params": chosen, "matrices": kind}
                for group in groups
                for kind in (True, False)
                if (chosen := [p for p in group["params"] if (group["decays"] and inside(p)) == kind])
            ],
            {},
        )
        ours = [group for group in self.param_groups if group["matrices"]]
        others = [group for group in self.param_groups if not group["matrices"]]
        self._members = [matrices(ours)] if ours else list[Optimizer]()
        if others:
            self._members.append(adamw(others, settings))
        for member in self._members:
            member.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Step both; ``closure`` is not supported."""
        if closure is not None:
            raise ValueError("two optimizers together take no closure")
        for member in self._members:
            member.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Not supported: checkpoints fill ``state``, which both share."""
        raise NotImplementedError("checkpoints fill the state of this optimizer, entry by entry")


def _tables(model: nn.Module) -> set[int]:
    """Weights that are looked up by row, and the head that scores every row."""
    found = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return found if head is None else {*found, id(head.weight)}
