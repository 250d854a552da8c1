"""Facts that everything descended from LLaVA shares: decoder, CLIP tower, projector, and their names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmix.convert._names import Rename, Unused
from vlmix.convert._source import PublishedFolder
from vlmix.core.errors import CheckpointError
from vlmix.models.configuration import VlmixConfig

CLIP = "model.vision_tower.vision_tower.vision_model."
HEAD_WIDTH = 64  # of every published CLIP; shapes do not show it
XXLARGE_WIDTH = 384
_LANGUAGES = ("Llama", "Mistral", "Mixtral", "Gemma", "Qwen2", "Phi")
_FOREIGN = re.compile(
    r"mm_|tune_|freeze_|use_mm_|unfreeze_|image_|optimize_|tokenizer_|aux_|vision_|is_multipath|input_image"
)
_NOT_LANGUAGE = frozenset(
    (
        "architectures",
        "model_type",
        "transformers_version",
        "torch_dtype",
        "auto_map",
        "_name_or_path",
        "dtype",
    )
)

LANGUAGE_NAMES = (
    Rename("lm_head.{rest}", "model.language_model.lm_head.{rest}"),
    Rename("model.{rest}", "model.language_model.model.{rest}"),
)
TEXT_SIDE = tuple(
    Unused(name, "the text side of CLIP")
    for name in ("text_model.{rest}", "text_projection.{rest}", "visual_projection.{rest}", "logit_scale")
)
LANGUAGE_UNUSED = (Unused("model.layers.{n}.self_attn.rotary_emb.inv_freq", "computed from the config"),)


def architecture(folder: PublishedFolder) -> str:
    """The class that wrote the checkpoint, or nothing."""
    found = folder.config.get("architectures")
    return str(found[0]) if isinstance(found, list) and found else ""


def language_config(folder: PublishedFolder) -> dict[str, Any]:
    """The decoder's own part of a flat ``config.json``.

    Raises:
        CheckpointError: if the class is not of a known decoder.

    """
    name = architecture(folder)
    kind = next((language for language in _LANGUAGES if language in name), None)
    if kind is None:
        raise CheckpointError(f"{folder.folder}: {name!r} is built on no decoder known here: {_LANGUAGES}")
    own = {
        key: value
        for key, value in folder.config.items()
        if not _FOREIGN.match(key) and key not in _NOT_LANGUAGE
    }
    return {**own, "model_type": kind.lower()}


def projector(config: Mapping[str, Any]) -> tuple[dict[str, Any], Rename]:
    """The projector's settings and names, from ``mm_projector_type``.

    Raises:
        CheckpointError: if it is of another kind.

    """
    kind = str(config.get("mm_projector_type", "linear"))
    if kind == "linear":
        return {"kind": "linear"}, Rename("model.mm_projector.{rest}", "model.projector.linear.{rest}")
    found = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    if found is None:
        raise CheckpointError(f"mm_projector_type {kind!r} is not known; known: linear, mlpNx_gelu")
    layers = Rename("model.mm_projector.{rest}", "model.projector.layers.{rest}")
    return {"kind": "mlp", "depth": int(found.group(1))}, layers


def flat_config(config: VlmixConfig, name: str, model_type: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """A config as LLaVA's descendants write it: the decoder's keys and their own side by side."""
    language = {
        key: value
        for key, value in config.language.to_dict().items()
        if key not in {*_NOT_LANGUAGE, "rope_parameters"}
    }
    rope = config.language.to_dict().get("rope_parameters") or {}
    if "rope_theta" in rope:
        language |= {"rope_theta": rope["rope_theta"], "rope_scaling": None}
    settings = config.projector_settings().model_dump()
    if settings["kind"] not in ("linear", "mlp") or settings.get("hidden") is not None:
        raise CheckpointError(f"the projector {settings} has no counterpart in this family")
    kind = "linear" if settings["kind"] == "linear" else f"mlp{settings['depth']}x_gelu"
    return {
        **language,
        "architectures": [name],
        "model_type": model_type,
        "mm_projector_type": kind,
        "mm_hidden_size": config.plan().fused.channels,
        "use_mm_proj": True,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
        **own,
    }


def written_class(config: VlmixConfig, pattern: str) -> str:
    """``pattern`` with the decoder's name in it, such as ``LlavaLlamaForCausalLM``.

    Raises:
        CheckpointError: if the family has no class for this decoder.

    """
    kind = str(config.language.model_type)
    name = next((language for language in _LANGUAGES if language.lower() == kind), None)
    if name is None:
        raise CheckpointError(f"a decoder of type {kind!r} has no class in this family; known: {_LANGUAGES}")
    return pattern.format(name)


def parts_are(config: VlmixConfig, encoders: Sequence[str], fusion: str, family: str) -> list[dict[str, Any]]:
    """The encoders' settings of a model that has just these parts.

    Raises:
        CheckpointError: if it has others.

    """
    settings = config.encoder_settings()
    found = ([part.kind for part in settings], config.fusion_settings().kind)
    if found != (list(encoders), fusion):
        raise CheckpointError(
            f"{family} is {list(encoders)} with {fusion}; this model is {found[0]} with {found[1]}"
        )
    return [part.model_dump(mode="json") for part in settings]


def clip_settings(folder: PublishedFolder, prefix: str) -> dict[str, Any]:
    """A CLIP tower's sizes, from the shapes of its tensors."""
    patch = shape_of(folder, f"{prefix}embeddings.patch_embedding.weight")
    positions = shape_of(folder, f"{prefix}embeddings.position_embedding.weight")[0] - 1
    side = math.isqrt(positions)
    if side * side != positions:
        raise CheckpointError(f"{folder.folder}: {positions} positions of CLIP fill no square")
    return {
        "kind": "clip",
        "image_size": side * patch[-1],
        "patch_size": patch[-1],
        "width": patch[0],
        "layers": count(folder, f"{prefix}encoder.layers."),
        "heads": max(patch[0] // HEAD_WIDTH, 1),
        "mlp": shape_of(folder, f"{prefix}encoder.layers.0.mlp.fc1.weight")[0],
    }


def convnext_settings(folder: PublishedFolder, stem: str, stages: str) -> dict[str, Any]:
    """A ConvNeXt's sizes, from the shapes of its tensors below the prefixes of stem and stages."""
    block = re.compile(re.escape(stages) + r"(\d)\.blocks\.(\d+)\.conv_dw\.weight")
    found = [(match, name) for name in folder.tensors if (match := block.fullmatch(name))]
    widths = {int(match[1]): folder.tensors[name].shape[0] for match, name in found}
    depths = [sum(int(match[1]) == stage for match, _ in found) for stage in range(4)]
    if sorted(widths) != [0, 1, 2, 3] or shape_of(folder, f"{stem}0.weight")[0] != widths[0]:
        raise CheckpointError(f"{folder.folder}: its ConvNeXt has not the four stages of one")
    return {
        "kind": "convnext",
        "depths": depths,
        "widths": [widths[stage] for stage in range(4)],
        # timm builds the xxlarge, which is 384 wide, with another constant than all smaller ones.
        "norm_eps": 1e-5 if widths[0] == XXLARGE_WIDTH else 1e-6,
    }


def convnext_names(prefix: str, ours: str, scales: str = "weight") -> tuple[Rename, ...]:
    """A timm ConvNeXt's names; transformers of the time stored scales as ``weight``, not ``gamma``."""
    blocks = "stages.{n}.blocks.{m}"
    return (
        Rename(f"{prefix}{blocks}.{scales}", f"{ours}{blocks}.gamma"),
        Rename(f"{prefix}{{rest}}", f"{ours}{{rest}}"),
    )


def scale_name(folder: PublishedFolder, prefix: str) -> str:
    """What a ConvNeXt's residual scales are called in this folder."""
    return "weight" if f"{prefix}stages.0.blocks.0.weight" in folder.tensors else "gamma"


def clip_unused(prefix: str, layers: int, blocks: int) -> tuple[Unused, ...]:
    """What a tower read at block ``blocks`` of ``layers`` leaves unread."""
    behind = [
        Unused(f"{prefix}encoder.layers.{index}.{{rest}}", "behind the layer that is read")
        for index in range(blocks, layers)
    ]
    return (
        *behind,
        Unused(f"{prefix}post_layernorm.{{rest}}", "only the pooled class token passes through it"),
        Unused(f"{prefix}embeddings.position_ids", "computed from the config"),
    )


def clip_prefix(folder: PublishedFolder) -> str:
    """What stands before the tensors of a CLIP tower in its own folder, which may hold the text side too."""
    for prefix in ("vision_model.", ""):
        if f"{prefix}embeddings.patch_embedding.weight" in folder.tensors:
            return prefix
    raise CheckpointError(f"{folder.folder}: holds no CLIP vision tower")


def named_tower(folder: PublishedFolder, name: str) -> PublishedFolder | None:
    """The folder of a tower that the config names by a path, where it lies beside the checkpoint."""
    for parent in (folder.folder, folder.folder.parent, Path()):
        if name and (parent / name / "config.json").is_file():
            return PublishedFolder(parent / name, folder.scratch)
    return None


def shape_of(folder: PublishedFolder, name: str) -> tuple[int, ...]:
    """The shape of a tensor that must be there."""
    if name not in folder.tensors:
        raise CheckpointError(f"{folder.folder}: {name} is missing")
    return folder.tensors[name].shape


def declared_clip(tower: PublishedFolder | None) -> dict[str, Any]:
    """What shapes do not show, heads and activation, where the tower's own config is at hand."""
    if tower is None:
        return {}
    config = tower.config.get("vision_config", tower.config)
    return {"heads": int(config["num_attention_heads"]), "activation": str(config["hidden_act"])}


def count(folder: PublishedFolder, prefix: str) -> int:
    """How many different numbers follow ``prefix``."""
    number = re.compile(re.escape(prefix) + r"(\d+)\.")
    return len({found.group(1) for name in folder.tensors if (found := number.match(name))})
