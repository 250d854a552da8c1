"""One Linear layer on every token (the first LLaVA)."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import PositiveFloat
from torch import nn

from vlmix.core.interfaces import Projector
from vlmix.core.parts import PROJECTORS
from vlmix.core.settings import PartSettings
from vlmix.core.tensors import FeatureMap, VisionSpec


class LinearSettings(PartSettings):
    """Every token is multiplied by ``scale`` at last."""

    kind: Literal["linear"] = "linear"  # pyright: ignore[reportIncompatibleVariableOverride]
    scale: PositiveFloat = 1.0

    @classmethod
    def tiny(cls) -> Self:
        """With a scale."""
        return cls(scale=1.5)


@PROJECTORS.register("linear")
class LinearProjector(Projector):
    """Keeps the grid."""

    settings_class = LinearSettings

    def __init__(self, settings: LinearSettings, spec: VisionSpec, width: int) -> None:
        super().__init__()
        self.scale = settings.scale
        self.linear = nn.Linear(spec.channels, width)

    @classmethod
    def plan(cls, settings: LinearSettings, spec: VisionSpec, width: int) -> VisionSpec:
        """The same grid at the language model's width."""
        return VisionSpec(spec.grid, width)

    def forward(self, features: FeatureMap) -> FeatureMap:
        """Map every token."""
        return FeatureMap(self.linear(features.tokens) * self.scale, features.grid)
