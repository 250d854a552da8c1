"""Linear layers with exact GELU between them on every token (LLaVA-1.5's ``mlp2x_gelu``)."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import PositiveFloat, PositiveInt

from vlmix.core.interfaces import Projector
from vlmix.core.parts import PROJECTORS
from vlmix.core.settings import PartSettings
from vlmix.core.tensors import FeatureMap, VisionSpec
from vlmix.projectors._mlp import mlp


class MlpSettings(PartSettings):
    """``depth`` Linear layers; ``hidden`` is their width in between, the language model's unless given.

    Without ``bias`` they only multiply, as in some checkpoints in transformers' layout.
    Every token is multiplied by ``scale`` at last: Mini-Gemini on Gemma, whose own tokens are, needs that.
    """

    kind: Literal["mlp"] = "mlp"  # pyright: ignore[reportIncompatibleVariableOverride]
    depth: PositiveInt = 2
    hidden: PositiveInt | None = None
    bias: bool = True
    scale: PositiveFloat = 1.0

    @classmethod
    def tiny(cls) -> Self:
        """Three layers with a width of their own in between."""
        return cls(depth=3, hidden=10, scale=1.5)


@PROJECTORS.register("mlp")
class MlpProjector(Projector):
    """Keeps the grid. Its layers are numbered as in LLaVA: 0, 2, …"""

    settings_class = MlpSettings

    def __init__(self, settings: MlpSettings, spec: VisionSpec, width: int) -> None:
        super().__init__()
        self.scale = settings.scale
        hidden = settings.hidden or width
        self.layers = mlp(spec.channels, hidden, width, settings.depth, bias=settings.bias)

    @classmethod
    def plan(cls, settings: MlpSettings, spec: VisionSpec, width: int) -> VisionSpec:
        """The same grid at the language model's width."""
        return VisionSpec(spec.grid, width)

    def forward(self, features: FeatureMap) -> FeatureMap:
        """Map every token."""
        return FeatureMap(self.layers(features.tokens) * self.scale, features.grid)
