"""Experts in place of feed-forward networks, each a copy of the network it replaces (sparse upcycling)."""

from __future__ import annotations

from typing import Literal, Self

from transformers import PreTrainedModel

from vlmix.core.experts import ExpertSettings
from vlmix.core.settings import PartSettings
from vlmix.train.transforms import TRANSFORMS
from vlmix.train.transforms._base import Transform
from vlmix.train.upcycling import reshape_model, upcycle_model


class UpcycleSettings(PartSettings):
    """``experts`` is one mixture, as under a model's ``experts``."""

    kind: Literal["upcycle"] = "upcycle"  # pyright: ignore[reportIncompatibleVariableOverride]
    experts: ExpertSettings

    @classmethod
    def tiny(cls) -> Self:
        """Two experts in every other layer of the decoder."""
        return cls(experts=ExpertSettings(count=2))


@TRANSFORMS.register("upcycle")
class Upcycle(Transform):
    """Gives the same answers as before. Papers: arXiv:2212.05055; MoE-LLaVA, arXiv:2401.15947, stage III."""

    settings_class = UpcycleSettings
    settings: UpcycleSettings

    def reshape(self, model: PreTrainedModel) -> None:
        """Make room for the experts."""
        reshape_model(model, self.settings.experts)

    def apply(self, model: PreTrainedModel) -> str:
        """Put the experts in and report the probe."""
        return str(upcycle_model(model, self.settings.experts))
