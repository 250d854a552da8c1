"""What a model costs, without making it: parameters, FLOPs, activation and cache memory.

Token counts are each part's own arithmetic. Everything else is counted by running the real modules on
torch's meta device, where tensors have shapes and no data: the count cannot disagree with the model, holds
for every decoder transformers has, and a 7B model takes seconds and no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from vlmix.core.parts import VIEWS
from vlmix.core.tensors import FeatureMap, VisionSpec
from vlmix.models.flops import flop_counter
from vlmix.models.instruction import asked_shapes
from vlmix.models.mixtures import active_parameters
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.models.quantised import quantised_numbers
from vlmix.models.viewing import tilings_tensor
from vlmix.moe.install import expert_layers
from vlmix.moe.layer import ExpertLayer

if TYPE_CHECKING:
    from vlmix.models.configuration import VisionPlan, VlmixConfig


@dataclass(frozen=True, slots=True)
class PartCost:
    """One part: its parameters, and the FLOPs (two per multiply-add) of its forward pass for one picture.

    ``spec`` is what it gives for one view. For the language model the FLOPs are those of reading the planned
    prompt once, and there is no ``spec``.
    """

    name: str
    parameters: int
    flops: int
    spec: VisionSpec | None = None


@dataclass(frozen=True, slots=True)
class MixtureCost:
    """One mixture: where it stands, the experts of each of its layers, how many of them one token meets."""

    place: str
    experts: tuple[int, ...]
    chosen: int


@dataclass(frozen=True, slots=True)
class ModelCost:
    """The whole model on one prompt of ``images`` pictures and ``text_tokens`` tokens of text.

    ``active`` counts the parameters that one token meets; ``in_4_bits`` are those kept so, in
    ``packed_bytes``.
    """

    vision: VisionPlan
    parts: tuple[PartCost, ...]
    active: int
    mixtures: tuple[MixtureCost, ...]
    images: int
    text_tokens: int
    bytes_per_number: int
    decode_flops: int
    cache_bytes_per_token: int
    activation_bytes: int
    in_4_bits: int
    packed_bytes: int

    @property
    def prompt_tokens(self) -> int:
        """Tokens the language model reads: visual and text."""
        return self.images * self.vision.tokens + self.text_tokens

    @property
    def parameters(self) -> int:
        """Parameters of all parts."""
        return sum(part.parameters for part in self.parts)

    @property
    def prefill_flops(self) -> int:
        """FLOPs to read the prompt: vision parts once per picture, language model once."""
        vision = sum(part.flops for part in self.parts[:-1])
        return self.images * vision + self.parts[-1].flops

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights."""
        return (self.parameters - self.in_4_bits) * self.bytes_per_number + self.packed_bytes

    @property
    def cache_bytes(self) -> int:
        """Memory of the key-value cache after the prompt."""
        return self.cache_bytes_per_token * self.prompt_tokens


@dataclass
class SavedBytes:
    """Bytes autograd keeps for the backward pass; each storage counts once, the model's own not at all."""

    total: int = 0
    seen: set[int] = field(default_factory=set)


def shape_only(config: VlmixConfig, dtype: torch.dtype = torch.bfloat16) -> VlmixForConditionalGeneration:
    """The model with shapes and no data."""
    with torch.device("meta"):
        model = VlmixForConditionalGeneration(config)
    cast("nn.Module", model).to(dtype)
    return model


def plan_model(
    config: VlmixConfig, *, images: int = 1, text_tokens: int = 64, dtype: torch.dtype = torch.bfloat16
) -> ModelCost:
    """Count what ``config`` costs on one prompt, held in ``dtype``.

    Raises:
        PlanError: if the parts cannot work together.

    """
    vision = config.plan()
    model = shape_only(config, dtype).eval()
    language, prompt = model.model.language_model, images * vision.tokens + text_tokens
    with asked_shapes(config.width, 1):
        parts = _vision_costs(config, model)
        prefill, decode, per_token = _language_costs(model, prompt, dtype)
    in_4_bits, packed_bytes = quantised_numbers(model)
    parts.append(
        PartCost(f"language_model ({config.language.model_type})", parameter_count(language), prefill)
    )
    return ModelCost(
        vision=vision,
        parts=tuple(parts),
        active=active_parameters(model),
        mixtures=_mixtures(model),
        images=images,
        text_tokens=text_tokens,
        bytes_per_number=dtype.itemsize,
        decode_flops=decode,
        cache_bytes_per_token=per_token,
        activation_bytes=training_bytes(model, rows=1, images=images, text_tokens=text_tokens),
        in_4_bits=in_4_bits,
        packed_bytes=packed_bytes,
    )


def _mixtures(model: VlmixForConditionalGeneration) -> tuple[MixtureCost, ...]:
    # The layers of one mixture share one settings object.
    found: dict[int, list[ExpertLayer]] = {}
    for layer in expert_layers(model):
        found.setdefault(id(layer.settings), []).append(layer)
    return tuple(
        MixtureCost(
            layers[0].settings.place, tuple(layer.router_experts for layer in layers), layers[0].chosen
        )
        for layers in found.values()
    )


def _language_costs(
    model: VlmixForConditionalGeneration, prompt: int, dtype: torch.dtype
) -> tuple[int, int, int]:
    """FLOPs to read the prompt, FLOPs of one more token, and bytes the cache keeps for each."""
    language, width = model.model.language_model, model.config.width
    embeds_BTD = torch.empty(1, prompt, width, device="meta", dtype=dtype)
    prefill = _flops(lambda: language(inputs_embeds=embeds_BTD, logits_to_keep=1))
    with torch.no_grad():
        cache = language(inputs_embeds=embeds_BTD, logits_to_keep=1, use_cache=True).past_key_values
    per_token = _cache_bytes(cache) // prompt
    decode = _flops(
        lambda: language(inputs_embeds=embeds_BTD[:, :1], past_key_values=cache, logits_to_keep=1)
    )
    return prefill, decode, per_token


def _vision_costs(config: VlmixConfig, model: VlmixForConditionalGeneration) -> list[PartCost]:
    """What every part before the language model costs for one picture."""
    inner, vision = model.model, config.plan()
    side = config.image_size
    costs = []
    for i, (settings, module, spec) in enumerate(
        zip(config.encoder_settings(), inner.encoders, vision.encoders, strict=True)
    ):
        shown = 1 if settings.sees == "picture" else vision.views
        flops = shown * _flops(lambda m=module: m(torch.empty(1, 3, side, side, device="meta")))
        costs.append(PartCost(f"encoders.{i} ({settings.kind})", parameter_count(module), flops, spec))
    tokens_VNC = torch.empty(
        vision.views, vision.fused.tokens, vision.fused.channels, device="meta", dtype=model.dtype
    )
    projector = _flops(lambda: inner.projector(FeatureMap(tokens_VNC, vision.fused.grid)))
    whole = _flops(lambda: inner.get_image_features(**pictures_of(config, 1)))
    fusion = max(whole - projector - sum(cost.flops for cost in costs), 0) + _refine_flops(config, model)
    names = {"fusion": config.fusion_settings().kind, "projector": config.projector_settings().kind}
    costs += [
        PartCost(f"fusion ({names['fusion']})", parameter_count(inner.fusion), fusion, vision.fused),
        PartCost(
            f"projector ({names['projector']})", parameter_count(inner.projector), projector, vision.projected
        ),
    ]
    if more := parameter_count(inner.views):
        costs.append(PartCost(f"views ({config.view_settings().kind})", more, 0))
    return costs


def _refine_flops(config: VlmixConfig, model: VlmixForConditionalGeneration) -> int:
    """What the fusion does inside the decoder for one picture."""
    inner, plan = model.model, config.plan()
    if not plan.inside:
        return 0
    pictures = pictures_of(config, 1)
    with torch.no_grad():
        memory = inner.see(
            pictures["pixel_values"], pictures.get("picture_values"), [plan.tiling]
        ).fused.memory
    order_N = inner.viewing.order([plan.tiling], torch.device("cpu"))
    cells_N = None if order_N is None else order_N[order_N >= 0].to("meta")
    count = plan.tokens if cells_N is None else len(cells_N)
    tokens_ND = torch.empty(count, config.width, device="meta", dtype=model.dtype)
    places = range(len(plan.inside))
    return sum(_flops(lambda p=place: inner.fusion.refine(p, tokens_ND, memory, cells_N)) for place in places)


def pictures_of(config: VlmixConfig, count: int) -> dict[str, Tensor]:
    """Shapes of ``count`` pictures as the model takes them, each with the most tokens there can be."""
    plan, side = config.plan(), config.image_size
    if not plan.varies:
        return {"pixel_values": torch.empty(count, 3, side, side, device="meta")}
    found = {
        "pixel_values": torch.empty(count * plan.views, 3, side, side, device="meta"),
        "image_tilings": tilings_tensor([plan.tiling] * count),
    }
    settings = config.view_settings()
    whole = VIEWS.get(settings.kind).picture_size(settings)
    return (
        found
        if whole is None
        else {**found, "picture_values": torch.empty(count, 3, whole, whole, device="meta")}
    )


def parameter_count(module: nn.Module) -> int:
    """Parameters of a module; tied ones count once, and those kept in 4 bits like any other."""
    return sum(parameter.numel() for parameter in module.parameters()) + quantised_numbers(module)[0]


def training_bytes(model: VlmixForConditionalGeneration, *, rows: int, images: int, text_tokens: int) -> int:
    """Activation memory one training forward keeps, with the parameters' own ``requires_grad``.

    ``model`` lives on the meta device; ``images`` and ``text_tokens`` are per row.
    """
    with count_saved(model) as saved:
        forward_loss(model, rows=rows, images=images, text_tokens=text_tokens)
    return saved.total


def forward_loss(model: VlmixForConditionalGeneration, *, rows: int, images: int, text_tokens: int) -> Tensor:
    """Run a training forward on shapes and return a scalar to differentiate."""
    config, inner = model.config, model.model
    dtype = next(iter(inner.projector.parameters()), torch.empty(0, dtype=model.dtype)).dtype
    with asked_shapes(config.width, 1):
        found = inner.get_image_features(**pictures_of(config, max(rows * images, 1))).pooler_output
    tokens_IND = torch.stack(list(cast("Any", found)))
    ids = torch.zeros(rows, text_tokens, dtype=torch.long, device="meta")
    visual_BND = tokens_IND.reshape(rows, -1, tokens_IND.shape[-1])[:, : images * tokens_IND.shape[1]]
    embeds_BTD = torch.cat([visual_BND.to(dtype), inner.get_input_embeddings()(ids)], 1)
    # With a cache, because without one transformers looks at the data for packed sequences.
    with asked_shapes(config.width, rows):
        out = inner.language_model(inputs_embeds=embeds_BTD, logits_to_keep=text_tokens, use_cache=True)
    return out.logits.float().log_softmax(-1).sum()


@contextmanager
def count_saved(model: nn.Module) -> Iterator[SavedBytes]:
    """Count the bytes autograd saves inside the ``with``."""
    saved = SavedBytes()
    held = (*model.parameters(), *model.buffers())
    weights = {tensor.untyped_storage()._cdata for tensor in held}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and storage._cdata not in saved.seen:
            saved.seen.add(storage._cdata)
            saved.total += storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def _flops(run: Callable[[], Any]) -> int:
    with flop_counter() as counter, torch.no_grad():
        run()
    return int(counter.get_total_flops())


def _cache_bytes(cache: Any) -> int:
    return sum(
        tensor.numel() * tensor.element_size()
        for layer in cache.layers
        for tensor in (layer.keys, layer.values)
    )
