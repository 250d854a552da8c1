"""Learning without forgetting: on the new task's inputs the model also says what it said before."""

from __future__ import annotations

from typing import Literal, Self

import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Tensor

from vlmix.core.settings import PartSettings
from vlmix.train.continual import CONTINUAL
from vlmix.train.continual._base import Seen
from vlmix.train.continual._teacher import Taught


class LwfSettings(PartSettings):
    """``weight`` of the distillation beside the answers; logits are divided by ``temperature``."""

    kind: Literal["lwf"] = "lwf"  # pyright: ignore[reportIncompatibleVariableOverride]
    weight: PositiveFloat = 1.0
    temperature: PositiveFloat = 2.0

    @classmethod
    def tiny(cls) -> Self:
        """Nothing to shrink."""
        return cls()


@CONTINUAL.register("lwf")
class Lwf(Taught):
    """Paper: Li and Hoiem, arXiv:1606.09282, section 3, with a word's whole vocabulary as the old outputs."""

    settings_class = LwfSettings
    settings: LwfSettings

    @property
    def asks_teacher(self) -> bool:
        """Always."""
        return True

    def penalty(self, seen: Seen) -> Tensor | None:
        """Divergence from what the model said before, at every supervised token."""
        theirs_NV = self.taught(seen)
        if theirs_NV is None:
            return None
        divergence = distillation(seen.logits, theirs_NV, self.settings.temperature)
        return self.settings.weight * divergence / seen.items


def distillation(logits_NV: Tensor, theirs_NV: Tensor, temperature: float) -> Tensor:
    """T squared times the sum of KL(theirs || ours), which keeps the gradient's size as T grows."""
    ours_NV = (logits_NV / temperature).log_softmax(-1)
    wanted_NV = (theirs_NV / temperature).log_softmax(-1)
    return temperature**2 * F.kl_div(ours_NV, wanted_NV, reduction="sum", log_target=True)
