"""One trained adapter becomes several equal ones with fresh routers (MoME's second stage)."""

from __future__ import annotations

from typing import Literal, Self, cast

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from vlmix.core.errors import RecipeError
from vlmix.core.experts import ExpertSettings
from vlmix.core.settings import PartSettings, read_settings
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.moe.install import expert_layers
from vlmix.moe.layer import ExpertLayer
from vlmix.train.transforms import TRANSFORMS
from vlmix.train.transforms._base import Transform


class ReplicateSettings(PartSettings):
    """``mixture`` is the number, from 0, of one with a single expert; it will have ``count`` of them."""

    kind: Literal["replicate"] = "replicate"  # pyright: ignore[reportIncompatibleVariableOverride]
    mixture: NonNegativeInt = 0
    count: PositiveInt = 4

    @classmethod
    def tiny(cls) -> Self:
        """Two experts."""
        return cls(count=2)


@TRANSFORMS.register("replicate")
class Replicate(Transform):
    """Copies stand apart only by what their routers make of them. Paper: MoME, arXiv:2407.12709, section 3.3.

    Where a router weighs what an expert gives by its probability, a copy starts with less of a say than the
    one it was copied from: at even scores 1 / K of it.
    """

    settings_class = ReplicateSettings
    settings: ReplicateSettings

    def reshape(self, model: PreTrainedModel) -> None:
        """Make room for the copies."""
        self._replace(model)

    def apply(self, model: PreTrainedModel) -> str:
        """Copy the expert of every layer and draw the routers anew."""
        pairs = self._replace(model)
        for old, new in pairs:
            copy_expert(old, new)
        count = self.settings.count
        return f"experts: {len(pairs)} layers with {count} copies of their one, and fresh routers"

    def _replace(self, model: PreTrainedModel) -> list[tuple[ExpertLayer, ExpertLayer]]:
        """Put larger layers in place of those of the mixture: each old one with its new one."""
        whole = cast("VlmixForConditionalGeneration", model)
        layers = self._layers(model)
        settings = read_settings(
            ExpertSettings, {**layers[0].settings.model_dump(), "count": self.settings.count}, "replicate"
        )
        pairs = [(layer, larger(layer, settings, whole.config)) for layer in layers]
        for _, new in pairs:
            whole.model.set_submodule(new.name, new)
        mixtures = [*(whole.config.experts or [])]
        mixtures[self.settings.mixture] = settings.model_dump(mode="json")
        whole.config.experts = mixtures
        return pairs

    def _layers(self, model: PreTrainedModel) -> list[ExpertLayer]:
        mixtures = cast("VlmixForConditionalGeneration", model).config.expert_settings()
        if self.settings.mixture >= len(mixtures):
            raise RecipeError(
                f"replicate.mixture: there is no mixture {self.settings.mixture}; they are counted from 0 "
                f"and there are {len(mixtures)}"
            )
        settings = mixtures[self.settings.mixture]
        if settings.kind == "ffn" or settings.count != 1:
            raise RecipeError(
                f"replicate.mixture: mixture {self.settings.mixture} has {settings.count} experts of kind "
                f"{settings.kind}; only one adapter or low-rank pair is copied (a dense network: `upcycle`)"
            )
        return [layer for layer in expert_layers(model) if layer.settings == settings]


def copy_expert(old: ExpertLayer, new: ExpertLayer) -> None:
    """Make every expert of ``new`` a copy of the only one of ``old``, and draw its router."""
    with torch.no_grad():
        new.router.reset()
        for stacked, single in zip(_stacked(new), _stacked(old), strict=True):
            stacked.copy_(single.expand_as(stacked))


def larger(layer: ExpertLayer, settings: ExpertSettings, config: PreTrainedConfig) -> ExpertLayer:
    """A layer as ``settings`` say around the same dense network; experts and router hold no values yet."""
    network, count = cast("nn.Module", layer.dense), cast("int", settings.count)
    return ExpertLayer(network, layer.shape, settings, count, layer.name, config)


def _stacked(layer: ExpertLayer) -> list[Tensor]:
    """What a layer has once for each expert, experts along the first axis."""
    own = [] if layer.strength is None else [layer.strength]
    return [*layer.experts.parameters(), *own]
