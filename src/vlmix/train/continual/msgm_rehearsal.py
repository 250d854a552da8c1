"""Soft targets and low-rank adapters, and a share of every earlier task seen again."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field

from vlmix.core.settings import PartSettings
from vlmix.train.continual import CONTINUAL
from vlmix.train.continual._compose import Composed
from vlmix.train.continual.lora import Lora, LoraSettings
from vlmix.train.continual.rehearsal import Rehearsal, RehearsalSettings
from vlmix.train.continual.soft_targets import SoftTargets, SoftTargetsSettings


class MsgmRehearsalSettings(PartSettings):
    """Those of its three parts."""

    kind: Literal["msgm_rehearsal"] = "msgm_rehearsal"  # pyright: ignore[reportIncompatibleVariableOverride]
    soft_targets: SoftTargetsSettings = Field(default_factory=SoftTargetsSettings)
    lora: LoraSettings = Field(default_factory=LoraSettings)
    rehearsal: RehearsalSettings = Field(default_factory=RehearsalSettings)

    @classmethod
    def tiny(cls) -> Self:
        """Nothing to shrink."""
        return cls()


@CONTINUAL.register("msgm_rehearsal")
class MsgmRehearsal(Composed):
    """Paper: arXiv:2410.19925, table 4."""

    settings_class = MsgmRehearsalSettings
    reshapes = True

    def __init__(self, settings: MsgmRehearsalSettings) -> None:
        parts = [SoftTargets(settings.soft_targets), Lora(settings.lora), Rehearsal(settings.rehearsal)]
        super().__init__(settings, parts)
