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
from torch.utils.flop_counter import FlopCounterMode

from vlmix.models.modeling import VlmixForConditionalGeneration

if TYPE_CHECKING:
    from vlmix.models.configuration import VisionPlan, VlmixConfig


@dataclass(frozen=True, slots=True)
class PartCost:
    """One part: its parameters, and the FLOPs (two per multiply-add) of its forward pass for one image.

    For the language model the FLOPs are those of reading the planned prompt once.
    """

    name: str
    parameters: int
    flops: int


@dataclass(frozen=True, slots=True)
class ModelCost:
    """The whole model on one prompt of ``images`` pictures and ``text_tokens`` tokens of text."""

    vision: VisionPlan
    parts: tuple[PartCost, ...]
    images: int
    text_tokens: int
    bytes_per_number: int
    decode_flops: int
    cache_bytes_per_token: int
    activation_bytes: int

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
        return self.parameters * self.bytes_per_number

    @property
    def cache_bytes(self) -> int:
        """Memory of the key-value cache after the prompt."""
        return self.cache_bytes_per_token * self.prompt_tokens


@dataclass
class SavedBytes:
    """Bytes autograd keeps for the backward pass; each storage counts once, parameters not at all."""

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
    inner, prompt = model.model, images * vision.tokens + text_tokens
    pixels_I3SS = torch.empty(1, 3, config.image_size, config.image_size, device="meta")
    named: list[tuple[str, nn.Module, int]] = [
        (f"encoders.{i} ({settings.kind})", module, 0)
        for i, (settings, module) in enumerate(zip(config.encoder_settings(), inner.encoders, strict=True))
    ]
    named = [(name, module, _flops(lambda m=module: m(pixels_I3SS))) for name, module, _ in named]
    seen = sum(flops for *_, flops in named)
    fused = inner.fusion(list(inner.encoders), pixels_I3SS)  # pyright: ignore[reportArgumentType]
    fusion = _flops(lambda: inner.fusion(list(inner.encoders), pixels_I3SS)) - seen  # pyright: ignore
    named.append((f"fusion ({config.fusion_settings().kind})", inner.fusion, max(fusion, 0)))
    projector = _flops(lambda: inner.projector(fused))
    named.append((f"projector ({config.projector_settings().kind})", inner.projector, projector))
    embeds_BTD = torch.empty(1, prompt, config.width, device="meta", dtype=dtype)
    language = inner.language_model
    prefill = _flops(lambda: language(inputs_embeds=embeds_BTD, logits_to_keep=1))
    named.append((f"language_model ({config.language.model_type})", language, prefill))
    with torch.no_grad():
        cache = language(inputs_embeds=embeds_BTD, logits_to_keep=1, use_cache=True).past_key_values
    per_token = _cache_bytes(cache) // prompt
    decode = _flops(
        lambda: language(inputs_embeds=embeds_BTD[:, :1], past_key_values=cache, logits_to_keep=1)
    )
    return ModelCost(
        vision=vision,
        parts=tuple(PartCost(name, parameter_count(module), flops) for name, module, flops in named),
        images=images,
        text_tokens=text_tokens,
        bytes_per_number=dtype.itemsize,
        decode_flops=decode,
        cache_bytes_per_token=per_token,
        activation_bytes=training_bytes(model, rows=1, images=images, text_tokens=text_tokens),
    )


def parameter_count(module: nn.Module) -> int:
    """Parameters of a module; tied ones count once."""
    return sum(parameter.numel() for parameter in module.parameters())


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
    pixels = torch.empty(max(rows * images, 1), 3, config.image_size, config.image_size, device="meta")
    tokens = cast("Tensor", inner.get_image_features(pixels).pooler_output)
    ids = torch.zeros(rows, text_tokens, dtype=torch.long, device="meta")
    visual_BND = tokens.reshape(rows, -1, tokens.shape[-1]) if images else tokens[:0].reshape(rows, 0, -1)
    embeds_BTD = torch.cat([visual_BND.to(dtype), inner.get_input_embeddings()(ids)], 1)
    # With a cache, because without one transformers looks at the data for packed sequences.
    logits = inner.language_model(inputs_embeds=embeds_BTD, logits_to_keep=text_tokens, use_cache=True).logits
    return logits.float().log_softmax(-1).sum()


@contextmanager
def count_saved(model: nn.Module) -> Iterator[SavedBytes]:
    """Count the bytes autograd saves inside the ``with``."""
    saved = SavedBytes()
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and storage._cdata not in saved.seen:
            saved.seen.add(storage._cdata)
            saved.total += storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def _flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return int(counter.get_total_flops())


def _cache_bytes(cache: Any) -> int:
    return sum(
        tensor.numel() * tensor.element_size()
        for layer in cache.layers
        for tensor in (layer.keys, layer.values)
    )
