"""No projector: encoders whose channels are already the language model's width (LLaVA's ``identity``)."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import PositiveFloat

from vlmix.core.errors import PlanError
from vlmix.core.interfaces import Projector
from vlmix.core.parts import PROJECTORS
from vlmix.core.settings import PartSettings
from vlmix.core.tensors import FeatureMap, VisionSpec


class IdentitySettings(PartSettings):
    """Every token is multiplied by ``scale``."""

    kind: Literal["identity"] = "identity"  # pyright: ignore[reportIncompatibleVariableOverride]
    scale: PositiveFloat = 1.0

    @classmethod
    def tiny(cls) -> Self:
        """With a scale."""
        return cls(scale=1.5)


@PROJECTORS.register("identity")
class IdentityProjector(Projector):
    """Keeps grid and channels; has no weights."""

    settings_class = IdentitySettings

    def __init__(self, settings: IdentitySettings, spec: VisionSpec, width: int) -> None:
        super().__init__()
        self.scale = settings.scale

    @classmethod
    def plan(cls, settings: IdentitySettings, spec: VisionSpec, width: int) -> VisionSpec:
        """The same map.

        Raises:
            PlanError: if its channels are not the language model's width.

        """
        if spec.channels != width:
            raise PlanError(
                f"identity: {spec.channels} channels are not the language model's {width}; "
                "take `linear` or `mlp`"
            )
        return VisionSpec(spec.grid, width)

    def forward(self, features: FeatureMap) -> FeatureMap:
        """The same tokens."""
        return FeatureMap(features.tokens * self.scale, features.grid)
