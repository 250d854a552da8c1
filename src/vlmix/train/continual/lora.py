"""Low-rank adapters on every Linear of the language model, merged into it after each task."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Literal, Self, cast

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from vlmix.core.adapters import AdapterSettings, adapter_name
from vlmix.core.errors import PlanError, RecipeError
from vlmix.core.settings import PartSettings
from vlmix.models.adapters import AdaptedLinear, add_adapters, merge_adapters
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.train.continual import CONTINUAL
from vlmix.train.continual._base import Batch, Method
from vlmix.train.continual._divided import held, piece_of
from vlmix.train.parallel.sharding import whole
from vlmix.train.trainable import short_names

_DECODER = "language_model."
_ADAPTER = adapter_name(0)


class LoraSettings(PartSettings):
    """Ranks are ``rank_share`` of the most a Linear could have; B A is scaled by ``alpha`` / sqrt(rank).

    With ``scaling: rank`` it is ``alpha`` / rank. A stage's rates for the language model become those
    of its adapters; the rest of it (embeddings, head, norms) is frozen.
    """

    kind: Literal["lora"] = "lora"  # pyright: ignore[reportIncompatibleVariableOverride]
    rank_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    alpha: PositiveFloat = 16.0
    scaling: Literal["rank_stabilised", "rank"] = "rank_stabilised"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @classmethod
    def tiny(cls) -> Self:
        """Nothing to shrink: the rank is relative."""
        return cls()


@CONTINUAL.register("lora")
class Lora(Method):
    """Paper: arXiv:2410.19925, section 3.2 and table 6; rsLoRA, arXiv:2312.03732."""

    settings_class = LoraSettings
    settings: LoraSettings
    reshapes = True

    def reshape(self, model: VlmixForConditionalGeneration) -> None:
        """Put the adapters on, without a draw from torch's own generator.

        Raises:
            PlanError: if the model has adapters already.

        """
        if model.config.adapters:
            raise PlanError(
                "continual.kind: lora puts adapters on the language model and merges them after each task, "
                "and the model has `adapters` of its own; remove one of the two"
            )
        adapters = AdapterSettings(
            match=[f"{_DECODER}*"],
            rank=None,
            rank_share=self.settings.rank_share,
            alpha=self.settings.alpha,
            scaling=self.settings.scaling,
            dropout=self.settings.dropout,
        )
        # The CPU's stream alone: on another device ``fill`` draws the values there are in the end.
        with torch.random.fork_rng(devices=[]):
            add_adapters(model, [adapters])

    @torch.no_grad()
    def fill(self, model: VlmixForConditionalGeneration) -> None:
        """A drawn from the CPU's generator, matrix by matrix, whoever holds which rows; B zero."""
        for _, down, up in _pairs(model):
            drawn_RI = torch.empty(down.shape)
            nn.init.kaiming_uniform_(drawn_RI, a=math.sqrt(5))
            held(down).copy_(piece_of(drawn_RI, down))
            held(up).zero_()

    def train(
        self, patterns: Mapping[str, float], model: VlmixForConditionalGeneration
    ) -> Mapping[str, float]:
        """Globs that reach into the language model reach its adapters only.

        Raises:
            RecipeError: if they reach none.

        """
        names = list(short_names(model))
        result: dict[str, float] = {}
        for pattern, rate in patterns.items():
            for glob in _without_base(pattern, names):
                result.pop(glob, None)  # the last one counts, and order says which that is
                result[glob] = rate
        if not any("lora_" in glob for glob in result):
            raise RecipeError(
                "continual.kind: lora trains adapters of the language model, but the `train` of this task "
                'reaches none of its Linears; add "language_model.*"'
            )
        return result

    def end(self, model: VlmixForConditionalGeneration, batches: Iterator[Batch]) -> None:
        """Merge: the next task starts from a model of the old structure that answers as this one does."""
        if self.processes.world > 1:
            _merge_in_parts(model)
        else:
            merge_adapters(model)


@torch.no_grad()
def _merge_in_parts(model: VlmixForConditionalGeneration) -> None:
    """``merge_adapters`` where each process holds rows of W and the same rows of B; A is gathered."""
    for layer, down, up in _pairs(model):
        down_RI, weight = whole(down.detach()).float(), held(layer.plain().weight)
        product_OI = layer.scaling[_ADAPTER] * (held(up).float() @ down_RI.to(held(up).device))
        weight.copy_(weight.float() + product_OI)
    wrapped = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, AdaptedLinear)]
    for name, layer in wrapped:
        model.set_submodule(name, layer.plain())
    model.config.adapters = None


def _pairs(model: nn.Module) -> Iterator[tuple[AdaptedLinear, Tensor, Tensor]]:
    """Every Linear with an adapter, and its A and B."""
    for layer in (layer for layer in model.modules() if isinstance(layer, AdaptedLinear)):
        down, up = (cast("nn.Linear", pairs[_ADAPTER]).weight for pairs in (layer.lora_A, layer.lora_B))
        yield layer, down, up


def _without_base(pattern: str, names: list[str]) -> list[str]:
    """Globs for what ``pattern`` matches without the language model's own parameters."""
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not any(_is_base(name) for name in found):
        return [pattern]
    kept = [name for name in found if not _is_base(name)]
    result: list[str] = []
    for head in dict.fromkeys(name.partition(".")[0] for name in kept):
        mine = [name for name in kept if name.startswith(f"{head}.")]
        whole = [name for name in names if name.startswith(f"{head}.") and not _is_base(name)]
        glob = f"{head}.*lora_*" if f"{head}." == _DECODER else f"{head}.*"
        result += [glob] if mine == whole else mine
    return result


def _is_base(name: str) -> bool:
    return name.startswith(_DECODER) and ".lora_" not in name
