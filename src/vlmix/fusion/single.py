"""One encoder alone: what it sees, unchanged; any others do not run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import NonNegativeInt
from torch import Tensor

from vlmix.core.errors import PlanError
from vlmix.core.interfaces import Fusion, VisionEncoder
from vlmix.core.parts import FUSIONS
from vlmix.core.settings import PartSettings
from vlmix.core.tensors import FeatureMap, TextContext, VisionSpec


class SingleSettings(PartSettings):
    """``which`` encoder, counted from 0."""

    kind: Literal["single"] = "single"  # pyright: ignore[reportIncompatibleVariableOverride]
    which: NonNegativeInt = 0

    @classmethod
    def tiny(cls) -> Self:
        """The first encoder."""
        return cls()


@FUSIONS.register("single")
class Single(Fusion):
    """Passes one encoder's map on."""

    settings_class = SingleSettings

    def __init__(self, settings: SingleSettings, specs: Sequence[VisionSpec]) -> None:
        super().__init__()
        self.which = settings.which

    @classmethod
    def plan(cls, settings: SingleSettings, specs: Sequence[VisionSpec]) -> VisionSpec:
        """That encoder's grid and channels.

        Raises:
            PlanError: if there is no such encoder.

        """
        if settings.which >= len(specs):
            raise PlanError(
                f"single: there is no encoder {settings.which}; they are counted from 0 and there are "
                f"{len(specs)}"
            )
        chosen = specs[settings.which]
        return VisionSpec(chosen.grid, chosen.channels)

    @classmethod
    def warnings(cls, settings: SingleSettings, specs: Sequence[VisionSpec]) -> list[str]:
        """Encoders that never run."""
        idle = [i for i in range(len(specs)) if i != settings.which]
        if not idle:
            return []
        return [f"single: encoders {idle} do not run; their weights are kept for nothing"]

    def forward(
        self,
        encoders: Sequence[VisionEncoder],
        pixel_values: Tensor,
        context: TextContext | None = None,
    ) -> FeatureMap:
        """Run the chosen encoder only."""
        return encoders[self.which](pixel_values)
