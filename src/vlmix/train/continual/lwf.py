"""Learning without forgetting: on the new task's inputs the model also says what it said before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, Self

import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Tensor

from vlmix.core.settings import PartSettings
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.train.continual import CONTINUAL
from vlmix.train.continual._base import Batch, Method, Seen
from vlmix.train.continual._teacher import Teacher, stored_teacher


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
class Lwf(Method):
    """Paper: Li and Hoiem, arXiv:1606.09282, section 3, with a word's whole vocabulary as the old outputs."""

    settings_class = LwfSettings
    settings: LwfSettings
    reads_logits = True

    def __init__(self, settings: LwfSettings) -> None:
        super().__init__(settings)
        self._teacher: Teacher | None = None

    @property
    def needs_whole(self) -> str:
        """A second model."""
        return "keeps a frozen copy of the model"

    def begin(self, model: VlmixForConditionalGeneration) -> None:
        """Freeze a copy."""
        self._teacher = Teacher(model)

    def penalty(self, seen: Seen) -> Tensor | None:
        """Divergence from the frozen copy at every supervised token."""
        if self._teacher is None:
            return None
        theirs_NV = self._teacher.logits(seen.batch)
        divergence = distillation(seen.logits, theirs_NV, self.settings.temperature)
        return self.settings.weight * divergence / seen.items

    def end(self, model: VlmixForConditionalGeneration, batches: Iterator[Batch]) -> None:
        """Let the copy go."""
        self._teacher = None

    def state(self) -> dict[str, Tensor]:
        """The copy's weights inside a task."""
        return {} if self._teacher is None else self._teacher.state()

    def load(self, state: Mapping[str, Tensor], model: VlmixForConditionalGeneration) -> None:
        """Make the copy again."""
        self._teacher = stored_teacher(state, model)


def distillation(logits_NV: Tensor, theirs_NV: Tensor, temperature: float) -> Tensor:
    """T squared times the sum of KL(theirs || ours), which keeps the gradient's size as T grows."""
    ours_NV = (logits_NV / temperature).log_softmax(-1)
    wanted_NV = (theirs_NV / temperature).log_softmax(-1)
    return temperature**2 * F.kl_div(ours_NV, wanted_NV, reduction="sum", log_target=True)
