"""Published weights for one encoder, from a hub id or folder, before a stage starts."""

from __future__ import annotations

from typing import Annotated, Literal, Self, cast

from pydantic import Field
from torch import nn
from transformers import PreTrainedModel

from vlmix.core.errors import RecipeError
from vlmix.core.interfaces import VisionEncoder
from vlmix.core.settings import PartSettings
from vlmix.train.transforms import TRANSFORMS
from vlmix.train.transforms._base import Transform


class LoadEncoderSettings(PartSettings):
    """``encoder`` counts from 0 in the model's list; ``weights`` is a hub id or folder."""

    kind: Literal["load_encoder"] = "load_encoder"  # pyright: ignore[reportIncompatibleVariableOverride]
    encoder: Annotated[int, Field(ge=0)]
    weights: Annotated[str, Field(min_length=1)]

    @classmethod
    def tiny(cls) -> Self:
        """The first encoder, from a folder."""
        return cls(encoder=0, weights="folder")


@TRANSFORMS.register("load_encoder")
class LoadEncoder(Transform):
    """Loads an encoder's published weights."""

    settings_class = LoadEncoderSettings
    settings: LoadEncoderSettings

    def apply(self, model: PreTrainedModel) -> str:
        """Load the weights in place."""
        load_encoder(model, self.settings.encoder, self.settings.weights)
        return f"encoder {self.settings.encoder}: weights of {self.settings.weights}"


def load_encoder(model: PreTrainedModel, index: int, weights: str) -> None:
    """Load published weights into encoder ``index`` of ``model``.

    Raises:
        RecipeError: if the model has no such encoder.
        CheckpointError: if the weights do not fit it.

    """
    encoders = list(cast("nn.ModuleList", model.get_submodule("model.encoders")))
    if index >= len(encoders):
        raise RecipeError(f"encoder {index}: the model has {len(encoders)}, counted from 0")
    cast("VisionEncoder", encoders[index]).load_weights(weights)
