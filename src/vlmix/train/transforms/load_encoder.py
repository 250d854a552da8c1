"""Weights for one encoder before a stage starts: published ones, or an encoder of another vlmix model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self, cast

from pydantic import ConfigDict, Field
from torch import nn
from transformers import PreTrainedModel

from vlmix.core.errors import RecipeError
from vlmix.core.interfaces import VisionEncoder
from vlmix.core.settings import PartSettings
from vlmix.models.adapters import bare
from vlmix.models.configuration import VlmixConfig
from vlmix.train.transforms import TRANSFORMS
from vlmix.train.transforms._base import Transform
from vlmix.train.transforms._donor import is_vlmix, read_encoder


class LoadEncoderSettings(PartSettings):
    """``encoder`` counts from 0 in the model's list; ``weights`` is a hub id or folder.

    With ``from``, ``weights`` is a vlmix model or run folder and ``from`` the number of an encoder in it; a
    run need not have finished.
    """

    model_config = ConfigDict(serialize_by_alias=True)

    kind: Literal["load_encoder"] = "load_encoder"  # pyright: ignore[reportIncompatibleVariableOverride]
    encoder: Annotated[int, Field(ge=0)]
    weights: Annotated[str, Field(min_length=1)]
    source: Annotated[int, Field(ge=0)] | None = Field(default=None, alias="from")

    @classmethod
    def tiny(cls) -> Self:
        """The first encoder, from a folder."""
        return cls(encoder=0, weights="folder")


@TRANSFORMS.register("load_encoder")
class LoadEncoder(Transform):
    """Loads an encoder's weights; adapters on it stay as they are."""

    settings_class = LoadEncoderSettings
    settings: LoadEncoderSettings

    def apply(self, model: PreTrainedModel) -> str:
        """Load the weights in place."""
        index, weights, source = self.settings.encoder, self.settings.weights, self.settings.source
        if source is None:
            load_encoder(model, index, weights)
            return f"encoder {index}: weights of {weights}"
        copy_encoder(model, index, weights, source)
        return f"encoder {index}: encoder {source} of {weights}"


def load_encoder(model: PreTrainedModel, index: int, weights: str) -> None:
    """Load published weights into encoder ``index`` of ``model``.

    Raises:
        RecipeError: if the model has no such encoder, or ``weights`` is a folder of vlmix.
        CheckpointError: if the weights do not fit it.

    """
    encoder = _encoder(model, index)
    if is_vlmix(Path(weights)):
        raise RecipeError(
            f"encoder {index}: {weights} is a vlmix folder; take one of its encoders before a stage with "
            f"{{kind: load_encoder, encoder: {index}, weights: {weights}, from: NUMBER}}"
        )
    with bare(encoder):
        encoder.load_weights(weights)


def copy_encoder(model: PreTrainedModel, index: int, folder: str, source: int) -> None:
    """Copy encoder ``source`` of the vlmix model or run in ``folder`` into encoder ``index`` of ``model``.

    Adapters it has there are merged into its weights.

    Raises:
        RecipeError: if the model has no such encoder.
        CheckpointError: if ``folder`` is none of vlmix, has no such encoder, or it does not fit.

    """
    encoder = _encoder(model, index)
    ours = cast("VlmixConfig", model.config).encoder_settings()[index]
    with bare(encoder):
        encoder.load_state_dict(read_encoder(Path(folder), source, ours, encoder.state_dict()))


def _encoder(model: PreTrainedModel, index: int) -> VisionEncoder:
    encoders = list(cast("nn.ModuleList", model.get_submodule("model.encoders")))
    if index >= len(encoders):
        raise RecipeError(f"encoder {index}: the model has {len(encoders)}, counted from 0")
    return cast("VisionEncoder", encoders[index])
