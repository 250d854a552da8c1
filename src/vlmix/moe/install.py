"""Expert layers put where a model's settings say: at construction, and into a trained dense model.

Names of parameters: ``…mlp.router.*``, ``…mlp.experts.*``; of what stays beside them ``…mlp.dense.*``,
``…mlp.shared.*`` and ``…mlp.blend.*``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig

from vlmix.core.errors import PlanError
from vlmix.core.experts import ExpertSettings
from vlmix.core.interfaces import Part
from vlmix.core.parts import ROUTERS, read_part
from vlmix.moe.layer import ExpertLayer
from vlmix.moe.structure import FeedForward, feed_forwards

DECODER = "language_model"


@dataclass(frozen=True, slots=True)
class _Place:
    """One network to replace: its name below the model, what it is, and how many experts it gets."""

    name: str
    network: nn.Module
    shape: FeedForward
    experts: int


def install(
    model: nn.Module, settings: ExpertSettings, config: PreTrainedConfig, *, causal: bool
) -> list[ExpertLayer]:
    """Replace the chosen networks below ``model`` by expert layers without weights, and return them.

    ``causal`` says that what a token gives must not depend on later ones. ``config`` is asked for the
    experts implementation each time experts run.

    Raises:
        PlanError: if there are no such networks, or the router cannot work there.

    """
    return [_replaced(model, settings, place, config) for place in _places(model, settings, causal=causal)]


def upcycle(
    model: nn.Module, settings: ExpertSettings, config: PreTrainedConfig, *, causal: bool
) -> list[ExpertLayer]:
    """The same in a model that has weights: experts start from the network they replace.

    Raises:
        PlanError: as ``install``.

    """
    layers = []
    for place in _places(model, settings, causal=causal):
        layer = _replaced(model, settings, place, config)
        with torch.no_grad():
            for module in layer.modules():
                if isinstance(module, Part):
                    module.reset()
        layer.fill(place.network)
        layers.append(layer)
    return layers


def expert_layers(model: nn.Module) -> list[ExpertLayer]:
    """Every expert layer below ``model``, in order."""
    return [module for module in model.modules() if isinstance(module, ExpertLayer)]


def _replaced(
    model: nn.Module, settings: ExpertSettings, place: _Place, config: PreTrainedConfig
) -> ExpertLayer:
    layer = ExpertLayer(place.network, place.shape, settings, place.experts, place.name, config)
    model.set_submodule(place.name, layer)
    return layer


def _places(model: nn.Module, settings: ExpertSettings, *, causal: bool) -> list[_Place]:
    _check_router(settings, causal=causal)
    try:
        root = model.get_submodule(settings.place)
    except AttributeError:
        raise PlanError(
            f"experts.place: this model has no {settings.place}; encoders are counted from 0"
        ) from None
    prefix = f"{settings.place}." if settings.place else ""
    found = {
        f"{prefix}{name}".rstrip("."): shape
        for name, shape in feed_forwards(root).items()
        if not _inside_experts(root, name)
    }
    if not found:
        raise PlanError(
            f"experts: {settings.place} ({type(root).__name__}) has no feed-forward network in a module of "
            "its own, down(act(up(x))) or down(act(gate(x)) * up(x)): nothing that experts could replace"
        )
    names = list(found)
    chosen = chosen_layers(settings, len(names))
    counts = _counts(settings, len(chosen))
    return [
        _Place(names[index], model.get_submodule(names[index]), found[names[index]], count)
        for index, count in sorted(zip(chosen, counts, strict=True))
    ]


def chosen_layers(settings: ExpertSettings, networks: int) -> list[int]:
    """The numbers of the networks, of so many, that get experts, in the order of the settings.

    Raises:
        PlanError: if a number is too large or given twice.

    """
    presets = {
        "interval": range(0, networks, 2),
        "first_half": range(networks // 2),
        "second_half": range(networks // 2, networks),
        "all": range(networks),
    }
    if isinstance(settings.layers, str):
        return list(presets[settings.layers])
    wrong = [index for index in settings.layers if index >= networks]
    if wrong or len({*settings.layers}) < len(settings.layers) or not settings.layers:
        raise PlanError(
            f"experts.layers: {list(settings.layers)} must name networks of {settings.place} once each; "
            f"there are {networks}, counted from 0"
        )
    return list(settings.layers)


def _counts(settings: ExpertSettings, layers: int) -> Sequence[int]:
    if isinstance(settings.count, int):
        return [settings.count] * layers
    if len(settings.count) == 1:
        return list(settings.count) * layers
    if len(settings.count) != layers:
        raise PlanError(f"experts.count: {len(settings.count)} numbers for {layers} layers")
    return settings.count


def _check_router(settings: ExpertSettings, *, causal: bool) -> None:
    raw = read_part(ROUTERS, settings.router, "router")
    router = ROUTERS.get(raw.kind)
    if causal and not router.causal:
        raise PlanError(
            f"router: {raw.kind} looks at all tokens to decide about one, so in a decoder it would see the "
            "answer before it is written. Use it in encoders, fusion or projector"
        )
    if router.reads == "instruction" and settings.scope != "instance":
        raise PlanError(f"router: {raw.kind} decides once for each row; set `scope: instance`")
    if settings.scope == "instance" and not router.causal:
        raise PlanError(f"router: {raw.kind} compares the tokens of a row; `scope: instance` leaves it one")
    if settings.kind == "lora" and router.mixes:
        raise PlanError(f"router: {raw.kind} mixes tokens before experts read them; use kind ffn or adapter")
    if causal and settings.scope == "instance" and router.reads == "tokens":
        raise PlanError(
            f"experts.scope: {raw.kind} would decide from all tokens of a row, the answer included; in a "
            "decoder `scope: instance` needs a router that reads the instruction, such as {kind: instance}"
        )


def _inside_experts(root: nn.Module, name: str) -> bool:
    """Whether a network already belongs to an expert layer, as its dense or shared one."""
    steps = name.split(".") if name else []
    return any(
        isinstance(root.get_submodule(".".join(steps[:depth])), ExpertLayer) for depth in range(len(steps))
    )
