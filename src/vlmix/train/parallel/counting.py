"""Choices of experts, counted over a step's micro-batches in their order, whichever processes run them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlmix.moe.balance import RoutingCounts
from vlmix.train.parallel.processes import Processes


@dataclass
class StepCounts(RoutingCounts):
    """Each micro-batch sees the choices of those before it and its own, as it does on one process.

    Processes take micro-batches in turn, so those before it in a round are of the processes before this one.
    While ``idle``, what runs here stands for no micro-batch and counts for nothing.
    """

    processes: Processes = field(default_factory=Processes)
    idle: bool = False

    def add(self, layer: str, counts_GE: Tensor) -> Tensor:
        """Count what this micro-batch chose, and return the sum of the step up to it; all must ask."""
        mine_GE = torch.zeros_like(counts_GE) if self.idle else counts_GE
        found = self.processes.gather_tensors(mine_GE)
        before_GE = self.layers.get(layer, torch.zeros_like(counts_GE))
        self.layers[layer] = before_GE + torch.stack(found).sum(0)
        return before_GE + torch.stack(found[: self.processes.rank + 1]).sum(0)
