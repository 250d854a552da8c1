"""Answers are learnt with a little of the probability left to other words."""

from __future__ import annotations

from typing import Annotated, Literal, Self

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vlmix.core.settings import PartSettings
from vlmix.train.continual import CONTINUAL
from vlmix.train.continual._base import Seen
from vlmix.train.continual._teacher import Taught


class SoftTargetsSettings(PartSettings):
    """The right word has 1 - ``alpha`` of the target; the others share ``alpha``.

    They do so evenly, or as the frozen model from before the task would choose among them (``teacher``).
    """

    kind: Literal["soft_targets"] = "soft_targets"  # pyright: ignore[reportIncompatibleVariableOverride]
    alpha: Annotated[float, Field(ge=0, lt=1)] = 0.01
    spread: Literal["uniform", "teacher"] = "uniform"

    @classmethod
    def tiny(cls) -> Self:
        """With a teacher, so that there is something to keep."""
        return cls(spread="teacher")


@CONTINUAL.register("soft_targets")
class SoftTargets(Taught):
    """Soft targets of arXiv:2410.19925, section 3.2; the teacher's are those of SGM, arXiv:2306.01904."""

    settings_class = SoftTargetsSettings
    settings: SoftTargetsSettings

    @property
    def asks_teacher(self) -> bool:
        """Where it says how the rest is spread."""
        return self.settings.spread == "teacher"

    def answers(self, seen: Seen) -> Tensor:
        """Cross entropy with the soft target, summed over tokens, divided by the step's."""
        alpha, theirs_NV = self.settings.alpha, self.taught(seen)
        if theirs_NV is None:
            return uniform_loss(seen.logits, seen.labels, alpha) / seen.items
        return taught_loss(seen.logits, seen.labels, theirs_NV, alpha) / seen.items


def uniform_loss(logits_NV: Tensor, labels_N: Tensor, alpha: float) -> Tensor:
    """Sum of cross entropies with 1 - alpha on the label and alpha / (V - 1) on every other word.

    This is label smoothing, whose share falls on the label too, with alpha V / (V - 1).
    """
    words = logits_NV.shape[-1]
    smoothing = alpha * words / (words - 1)
    return F.cross_entropy(logits_NV, labels_N, label_smoothing=smoothing, reduction="sum")


def taught_loss(logits_NV: Tensor, labels_N: Tensor, theirs_NV: Tensor, alpha: float) -> Tensor:
    """Sum of cross entropies with 1 - alpha on the label and alpha spread as the teacher ranks the others."""
    label_N1 = labels_N.unsqueeze(1)
    spread_NV = theirs_NV.scatter(1, label_N1, float("-inf")).softmax(-1)
    logs_NV = logits_NV.log_softmax(-1)
    own_N1 = logs_NV.gather(1, label_N1)
    return -((1 - alpha) * own_N1.sum() + alpha * (spread_NV * logs_NV).sum())
