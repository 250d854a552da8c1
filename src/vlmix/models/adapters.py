"""Low-rank adapters on a model's Linears: put on, taken off, merged (LoRA and DoRA by peft; QLoRA).

A Linear that has some is ``base_layer`` inside its wrapper: ``q_proj.weight`` becomes
``q_proj.base_layer.weight``, beside ``q_proj.lora_A.adapter_0.weight`` and ``lora_B``; with DoRA also beside
``lora_magnitude_vector``. In 4 bits it is ``q_proj.base_layer.packed`` and ``scales``.
"""

from __future__ import annotations

import copy
import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, cast

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
from vlmix.models.quantised import Nf4Linear, dequantised

_SIDES = ("encoders.", "fusion.", "projector.", "language_model.")
_OWN = re.compile(r"\.lora_(A|B|magnitude_vector)\.adapter_\d+\.weight$")


class AdaptedLinear(LoraLinear, Part):
    """A Linear with its adapters; starts as the Linear alone."""

    def reset(self) -> None:
        """A as a Linear of its own would start, B zero; a weight in 4 bits as torch's own Linear."""
        if isinstance(base := self.get_base_layer(), Nf4Linear):
            base.reset()
        self.begin(list(self.lora_A))

    def begin(self, names: Sequence[str]) -> None:
        """Let the adapters of these names start anew; the weight stays."""
        for name in names:
            init.kaiming_uniform_(cast("nn.Linear", self.lora_A[name]).weight, a=math.sqrt(5))
            init.zeros_(cast("nn.Linear", self.lora_B[name]).weight)
            if name in self.lora_magnitude_vector:
                init.copy_(self._magnitude(name), _lengths(self.weight))

    @property
    def rewritten(self) -> bool:
        """Whether more than the Linear itself depends on its weight."""
        return bool(self.lora_magnitude_vector) or isinstance(self.get_base_layer(), Nf4Linear)

    def plain(self) -> nn.Linear:
        """The Linear below; where it is kept in 4 bits, one with the weight in full."""
        base = self.get_base_layer()
        return base.plain() if isinstance(base, Nf4Linear) else cast("nn.Linear", base)

    def quantise(self) -> None:
        """Keep the weight in 4 bits from now on."""
        if not isinstance(base := self.get_base_layer(), Nf4Linear):
            self.base_layer = Nf4Linear(cast("nn.Linear", base))

    @torch.no_grad()
    def keep(self, linear: nn.Linear, before_O: Tensor) -> None:
        """Go on with a weight that was changed outside, whose rows had the lengths ``before_O``.

        A row that DoRA has not rescaled is not rescaled afterwards; the others keep their factor.
        """
        if isinstance(base := self.get_base_layer(), Nf4Linear):
            base.fill(linear.weight)
        after_O = _lengths(self.weight)
        for name in self.lora_magnitude_vector:
            magnitude_O = self._magnitude(name)
            scaled_O = magnitude_O / before_O * after_O
            magnitude_O.copy_(after_O.where(magnitude_O == before_O, scaled_O))

    def _magnitude(self, name: str) -> Tensor:
        return cast("Tensor", self.lora_magnitude_vector[name].weight)


def install_adapters(
    model: nn.Module, head: nn.Module | None, adapters: Sequence[AdapterSettings], first: int = 0
) -> None:
    """Wrap every Linear of the model's parts that an adapter matches, except the ``head`` and routers.

    ``first`` is the number of the first of these adapters, where the model has some already.

    Raises:
        PlanError: if a glob matches no such Linear, or an adapter would stand beside one that rescales.

    """
    for index, settings in enumerate(adapters, first):
        linears = _linears(model, head)
        matched = {name for glob in settings.match for name in _matched(glob, linears, index)}
        chosen = [name for name in linears if name in matched]
        _check_alone(linears, chosen, settings, index)
        holder = nn.ModuleList([linears[name] for name in chosen])
        trains = {parameter: parameter.requires_grad for parameter in holder.parameters()}
        # In a list of their own, so that peft neither freezes the rest of the model nor renames targets.
        inject_adapter_in_model(_peft_config(settings, list(holder)), holder, adapter_name(index))
        for parameter, flag in trains.items():
            parameter.requires_grad_(flag)
        for name, layer in zip(chosen, holder, strict=True):
            wrapped = cast("AdaptedLinear", layer)
            wrapped.set_adapter(list(wrapped.lora_A))
            if settings.quantise is not None:
                wrapped.quantise()
            model.set_submodule(name, wrapped)


def add_adapters(model: PreTrainedModel, adapters: Sequence[AdapterSettings]) -> None:
    """Put more adapters on a whole vlmix model that has its weights, and note them in its configuration.

    They come after those it has, start anew from torch's own generator, and leave what the model says as it
    was, except that weights kept in 4 bits are rounded.

    Raises:
        PlanError: as ``install_adapters``.

    """
    old = cast("VlmixConfig", model.config)
    first = len(old.adapters or [])
    head = cast("nn.Module", model.get_output_embeddings())
    install_adapters(model.get_submodule("model"), head, adapters, first)
    fresh = [adapter_name(index) for index in range(first, first + len(adapters))]
    with torch.no_grad():
        for layer in _wrapped(model).values():
            layer.begin([name for name in fresh if name in layer.lora_A])
    _note(model, [*(old.adapters or []), *(settings.model_dump() for settings in adapters)])


@contextmanager
def bare(module: nn.Module) -> Iterator[None]:
    """Take every adapter below ``module`` off inside the ``with``, so that weights have their own names.

    Weights kept in 4 bits are there in full meanwhile; unless they are changed, they are the same afterwards.
    """
    wrapped = _wrapped(module)
    plain = {name: layer.plain() for name, layer in wrapped.items()}
    lengths = {name: _lengths(layer.weight) for name, layer in wrapped.items() if layer.rewritten}
    for name, linear in plain.items():
        module.set_submodule(name, linear)
    try:
        yield
    finally:
        for name, layer in wrapped.items():
            module.set_submodule(name, layer)
            if name in lengths:
                layer.keep(plain[name], lengths[name])


def reset_adapters(module: nn.Module) -> None:
    """Let every adapter below ``module`` start anew, A drawn from torch's own generator and B zero."""
    with torch.no_grad():
        for layer in _wrapped(module).values():
            layer.begin(list(layer.lora_A))


def merged_tensors(tensors: Mapping[str, Tensor], adapters: Sequence[AdapterSettings]) -> dict[str, Tensor]:
    """A state dict with adapters as one without: W + s B A under the Linear's own name, in full precision."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, wrapped, own = name.rpartition(".base_layer.")
        if wrapped and own in {"weight", "packed"}:
            result[f"{layer}.weight"] = _merged(layer, tensors, adapters)
        elif wrapped and own != "scales":
            result[f"{layer}.{own}"] = tensor
        elif not wrapped and not _OWN.search(name):
            result[name] = tensor
    return result


def merge_adapters(model: PreTrainedModel) -> int:
    """Make every adapter a part of its weight and take it off; returns how many Linears had some.

    ``model``, a whole vlmix model, is changed in place and is then one without adapters: its outputs stay as
    they were up to rounding. Weights that were kept in 4 bits are in full afterwards.
    """
    wrapped = _wrapped(model)
    tensors = merged_tensors(model.state_dict(), cast("VlmixConfig", model.config).adapter_settings())
    for name, layer in wrapped.items():
        model.set_submodule(name, layer.plain())
    model.load_state_dict(tensors)
    _note(model, None)
    return len(wrapped)


def _note(model: PreTrainedModel, adapters: list[dict[str, Any]] | None) -> None:
    """Give ``model`` a configuration of its own with these adapters."""
    old = model.config
    config = cast("VlmixConfig", copy.deepcopy(old))
    config.adapters = adapters
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config is old:
            module.config = config


def _peft_config(settings: AdapterSettings, linears: Sequence[nn.Module]) -> LoraConfig:
    sized = cast("Sequence[nn.Linear]", linears)
    ranks = {str(i): settings.rank_of(each.in_features, each.out_features) for i, each in enumerate(sized)}
    config = LoraConfig(
        r=settings.rank or 1,
        rank_pattern=ranks,
        lora_alpha=settings.alpha,  # pyright: ignore[reportArgumentType]  (any number divides)
        lora_dropout=settings.dropout,
        use_rslora=settings.scaling == "rank_stabilised",
        use_dora=settings.dora,
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
    parts = [(name, module) for name, module in model.named_modules() if isinstance(module, Part)]
    past = {f"{name}.{linear}" for name, part in parts for linear in part.past_linears}
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
            and name not in past
        )
    }


def _matched(glob: str, names: Iterable[str], index: int) -> list[str]:
    if found := [name for name in names if fnmatchcase(name, glob)]:
        return found
    known = list(names)
    close = difflib.get_close_matches(glob, known, n=2, cutoff=0.4) or [*known[:1], *known[-1:]]
    raise PlanError(
        f"adapters.{index}.match: {glob!r} matches no Linear that can have an adapter, such as "
        f"{' or '.join(close)}. Networks that experts replace and routers have none; the head trains whole"
    )


def _check_alone(
    linears: Mapping[str, nn.Module], chosen: Sequence[str], settings: AdapterSettings, index: int
) -> None:
    """A pair that rescales W + s B A leaves no meaning to another pair on the same W."""
    for name in chosen:
        layer = linears[name]
        if isinstance(layer, AdaptedLinear) and (settings.dora or layer.lora_magnitude_vector):
            raise PlanError(
                f"adapters.{index}: {name} has another adapter already, and with `dora` a Linear takes one "
                "only. Let their `match` name different Linears"
            )


def _wrapped(module: nn.Module) -> dict[str, AdaptedLinear]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, AdaptedLinear)}


def _lengths(weight_OI: Tensor) -> Tensor:
    """Each row's length, as peft's DoRA computes it."""
    return torch.linalg.norm(weight_OI.detach(), dim=1)


def _merged(layer: str, tensors: Mapping[str, Tensor], adapters: Sequence[AdapterSettings]) -> Tensor:
    added: list[Tensor] = []
    magnitude_O: Tensor | None = None
    for index, settings in enumerate(adapters):
        down, up, length_O = (
            tensors.get(f"{layer}.lora_{part}.{adapter_name(index)}.weight")
            for part in ("A", "B", "magnitude_vector")
        )
        if down is not None and up is not None:
            added.append(settings.scale(down.shape[0]) * (up.float() @ down.float()))
            magnitude_O = length_O
    weight = tensors.get(f"{layer}.base_layer.weight")
    if weight is None:
        packed, scales = (tensors[f"{layer}.base_layer.{part}"] for part in ("packed", "scales"))
        weight = dequantised(packed, scales, cast("tuple[int, int]", tuple(added[0].shape)))
    total_OI = weight.float()
    for product_OI in added:
        total_OI = total_OI + product_OI
    if magnitude_O is not None:
        total_OI = total_OI * (magnitude_O.float() / _lengths(total_OI))[:, None]
    return total_OI.to(weight.dtype)
