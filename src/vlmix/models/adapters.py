"""Low-rank adapters on Linears of encoders and language model: put on, taken off, merged (LoRA, by peft).

A Linear that has some is ``base_layer`` inside its wrapper: ``q_proj.weight`` becomes
``q_proj.base_layer.weight``, beside ``q_proj.lora_A.adapter_0.weight`` and ``lora_B``.
"""

from __future__ import annotations

import copy
import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import cast

import torch
import transformers.initialization as init
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel

from vlmix.core.adapters import AdapterSettings, adapter_name
from vlmix.core.errors import PlanError
from vlmix.core.interfaces import Part, Router
from vlmix.models.configuration import VlmixConfig

_SIDES = ("encoders.", "language_model.")


class AdaptedLinear(LoraLinear, Part):
    """A Linear with its adapters; starts as the Linear alone."""

    def reset(self) -> None:
        """A as a Linear of its own would start, B zero."""
        for name in self.lora_A:
            init.kaiming_uniform_(cast("nn.Linear", self.lora_A[name]).weight, a=math.sqrt(5))
            init.zeros_(cast("nn.Linear", self.lora_B[name]).weight)


def install_adapters(model: nn.Module, head: nn.Module | None, adapters: Sequence[AdapterSettings]) -> None:
    """Wrap every Linear of the encoders and the language model that an adapter matches, except the ``head``.

    Raises:
        PlanError: if a glob matches no such Linear.

    """
    for index, settings in enumerate(adapters):
        linears = _linears(model, head)
        matched = {name for glob in settings.match for name in _matched(glob, linears, index)}
        chosen = [name for name in linears if name in matched]
        holder = nn.ModuleList([linears[name] for name in chosen])
        trains = {parameter: parameter.requires_grad for parameter in holder.parameters()}
        # In a list of their own, so that peft neither freezes the rest of the model nor renames targets.
        inject_adapter_in_model(_peft_config(settings), holder, adapter_name(index))
        for parameter, flag in trains.items():
            parameter.requires_grad_(flag)
        for name, layer in zip(chosen, holder, strict=True):
            wrapped = cast("AdaptedLinear", layer)
            wrapped.set_adapter(list(wrapped.lora_A))
            model.set_submodule(name, wrapped)


@contextmanager
def bare(module: nn.Module) -> Iterator[None]:
    """Take every adapter below ``module`` off inside the ``with``, so that weights have their own names."""
    wrapped = _wrapped(module)
    for name, layer in wrapped.items():
        module.set_submodule(name, layer.get_base_layer())
    try:
        yield
    finally:
        for name, layer in wrapped.items():
            module.set_submodule(name, layer)


def reset_adapters(module: nn.Module) -> None:
    """Let every adapter below ``module`` start anew, A drawn from torch's own generator and B zero."""
    with torch.no_grad():
        for layer in _wrapped(module).values():
            layer.reset()


def merged_tensors(tensors: Mapping[str, Tensor], adapters: Sequence[AdapterSettings]) -> dict[str, Tensor]:
    """A state dict with adapters as one without: W + alpha / rank * B A under the Linear's own name."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, wrapped, own = name.rpartition(".base_layer.")
        if wrapped and own == "weight":
            result[f"{layer}.weight"] = _merged(tensor, layer, tensors, adapters)
        elif wrapped:
            result[f"{layer}.{own}"] = tensor
        elif not re.search(r"\.lora_[AB]\.adapter_\d+\.weight$", name):
            result[name] = tensor
    return result


def merge_adapters(model: PreTrainedModel) -> int:
    """Add every adapter's product into its weight and take it off; returns how many Linears had some.

    ``model``, a whole vlmix model, is changed in place and is then one without adapters: its outputs stay as
    they were up to rounding.
    """
    old, wrapped = cast("VlmixConfig", model.config), _wrapped(model)
    tensors = merged_tensors(model.state_dict(), old.adapter_settings())
    for name, layer in wrapped.items():
        model.set_submodule(name, layer.get_base_layer())
    model.load_state_dict(tensors)
    config = copy.deepcopy(old)
    config.adapters = None
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config is old:
            module.config = config
    return len(wrapped)


def _peft_config(settings: AdapterSettings) -> LoraConfig:
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # pyright: ignore[reportArgumentType]  (any number divides)
        lora_dropout=settings.dropout,
        target_modules=r"\d+",
    )
    config._register_custom_module({nn.Linear: AdaptedLinear})
    return config


def _linears(model: nn.Module, head: nn.Module | None) -> dict[str, nn.Module]:
    """The Linears that may have an adapter, bare or wrapped, by name."""
    wrapped = _wrapped(model)
    # Routers read their weights in float32 without calling the Linear, past any adapter.
    routers = [name for name, module in model.named_modules() if isinstance(module, Router)]
    inside = tuple(f"{name}." for name in (*wrapped, *routers))
    return {
        name: module
        for name, module in model.named_modules()
        if name in wrapped
        or (
            isinstance(module, nn.Linear)
            and module is not head
            # torch's own attention reads this one's weight without calling it, past any adapter.
            and not isinstance(module, NonDynamicallyQuantizableLinear)
            and name.startswith(_SIDES)
            and not name.startswith(inside)
        )
    }


def _matched(glob: str, names: Iterable[str], index: int) -> list[str]:
    if found := [name for name in names if fnmatchcase(name, glob)]:
        return found
    known = list(names)
    close = difflib.get_close_matches(glob, known, n=2, cutoff=0.4) or [*known[:1], *known[-1:]]
    raise PlanError(
        f"adapters.{index}.match: {glob!r} matches no Linear of an encoder or the language model, such as "
        f"{' or '.join(close)}. Fusion, projector and the head train whole"
    )


def _wrapped(module: nn.Module) -> dict[str, AdaptedLinear]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, AdaptedLinear)}


def _merged(
    weight: Tensor, layer: str, tensors: Mapping[str, Tensor], adapters: Sequence[AdapterSettings]
) -> Tensor:
    total = weight.float()
    for index, settings in enumerate(adapters):
        down, up = (tensors.get(f"{layer}.lora_{side}.{adapter_name(index)}.weight") for side in "AB")
        if down is not None and up is not None:
            total = total + settings.scale * (up.float() @ down.float())
    return total.to(weight.dtype)
