"""Soft targets and low-rank adapters together: SGM without what needs classes."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field

from vlmix.core.settings import PartSettings
from vlmix.train.continual import CONTINUAL
from vlmix.train.continual._compose import Composed
from vlmix.train.continual.lora import Lora, LoraSettings
from vlmix.train.continual.soft_targets import SoftTargets, SoftTargetsSettings


class MsgmSettings(PartSettings):
    """Those of its two parts."""

    kind: Literal["msgm"] = "msgm"  # pyright: ignore[reportIncompatibleVariableOverride]
    soft_targets: SoftTargetsSettings = Field(default_factory=SoftTargetsSettings)
    lora: LoraSettings = Field(default_factory=LoraSettings)

    @classmethod
    def tiny(cls) -> Self:
        """With a teacher."""
        return cls(soft_targets=SoftTargetsSettings.tiny())


@CONTINUAL.register("msgm")
class Msgm(Composed):
    """Paper: arXiv:2410.19925, section 3.2, after SGM, arXiv:2306.01904."""

    settings_class = MsgmSettings
    reshapes = True

    def __init__(self, settings: MsgmSettings) -> None:
        super().__init__(settings, [SoftTargets(settings.soft_targets), Lora(settings.lora)])
