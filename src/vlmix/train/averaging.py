"""The running average of the weights a stage trains, which are set to it when the stage ends."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vlmix.core.optimization import EmaSettings


class Averages:
    """average <- d average + (1 - d) weight after each update, in float32 and beside the weights.

    Training goes on with the weights themselves. Buffers are not averaged: those that are statistics are
    averages already.
    """

    def __init__(self, settings: EmaSettings, parameters: Mapping[str, nn.Parameter]) -> None:
        """Start from the weights as they are."""
        self._settings, self._parameters = settings, dict(parameters)
        self._updates = torch.tensor(0)
        self._averages = {
            name: parameter.detach().to(torch.float32, copy=True) for name, parameter in parameters.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after an update."""
        decay = self._settings.decay
        if self._settings.warmup:
            updates = int(self._updates)
            decay = min(decay, (1 + updates) / (10 + updates))
        for name, average in self._averages.items():
            average.lerp_(self._parameters[name].detach().float(), 1 - decay)
        self._updates += 1

    @torch.no_grad()
    def hand_on(self) -> None:
        """Set the weights to their averages."""
        for name, average in self._averages.items():
            self._parameters[name].copy_(average)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has to keep; to go on from one, these very tensors are filled."""
        return {"updates": self._updates, **self._averages}
