"""Cambrian-1 (arXiv:2406.16860): several encoders, aggregated before the decoder and between its layers.

Its encoders were frozen and lie in folders of their own, in transformers' names (SigLIP, CLIP, DINOv2) or
OpenCLIP's (ConvNeXt). No published file and no tensor of the authors' whole model was at hand: names and
order of operations follow their source, the aggregator's layers are compared with their own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from vlmix.convert._family import Family, Reading, Writing
from vlmix.convert._llava_parts import LANGUAGE, TEMPLATES, chat_template, language_config, required
from vlmix.convert._names import Names, Rename, Unused
from vlmix.convert._source import PublishedFolder
from vlmix.convert._towers import (
    ConvnextTower,
    clip_at,
    clip_blocks,
    clip_names,
    clip_settings,
    convnext_at,
    convnext_names,
    convnext_settings,
    placed,
)
from vlmix.convert.registry import FAMILIES
from vlmix.core.errors import CheckpointError
from vlmix.models.configuration import VlmixConfig

_HEADS, _CONVNEXT_SIZE = 16, 1024  # constants of the authors' code
_SIZE, _STAGES = re.compile(r"-res(\d+)"), "multi-stage"
_INSIDE_TOWERS = "model.vision_tower_aux_list."
_LAYER = (
    ("pos_embed_{n}", "places.{n}"),
    ("proj_out.linear_1.{rest}", "mlp.0.{rest}"),
    ("proj_out.linear_2.{rest}", "mlp.2.{rest}"),
    ("cross_attn.q_proj.{rest}", "query.{rest}"),
    ("cross_attn.o_proj.{rest}", "out.{rest}"),
    ("cross_attn.k_proj_{n}.{rest}", "keys.{n}.{rest}"),
    ("cross_attn.v_proj_{n}.{rest}", "values.{n}.{rest}"),
    ("{rest}", "{rest}"),
)
_DINOV2_ATTENTION = (
    ("attention.query", "q_proj"),
    ("attention.key", "k_proj"),
    ("attention.value", "v_proj"),
    ("output.dense", "o_proj"),
)

Found = tuple[dict[str, Any], PublishedFolder, Names]


@FAMILIES.register("cambrian")
class Cambrian(Family):
    """Folders written by Cambrian's own classes, with encoders in folders of their own."""

    @classmethod
    def recognises(cls, folder: PublishedFolder) -> bool:
        """The layers of an aggregator."""
        return any(name.startswith("model.vision_sampler_0.") for name in folder.tensors)

    @classmethod
    def read(cls, folder: PublishedFolder) -> Reading:
        """Encoders in the order of the config, each brought to as many tokens as it says."""
        config, language = folder.config, language_config(folder)
        _check(folder)
        encoders = [
            _encoder(folder, index, str(name), math.isqrt(int(tokens)))
            for index, (name, tokens) in enumerate(
                zip(
                    required(folder, "mm_vision_tower_aux_list"),
                    required(folder, "mm_vision_tower_aux_token_len_list"),
                    strict=True,
                )
            )
        ]
        side = math.isqrt(int(required(folder, "image_token_len")))
        meant = {
            "text_config": language,
            "encoders": [settings for settings, *_ in encoders],
            "views": {"kind": "unpadded"},
            "fusion": {
                "kind": "spatial_aggregator",
                "grid": [side, side],
                "width": int(required(folder, "vision_hidden_size")),
                "heads": _HEADS,
                "depth": int(required(folder, "connector_depth")),
                "inside": _inside(config),
            },
            "projector": {"kind": "mlp"},
            "image_size": max(settings["image_size"] for settings, *_ in encoders),
        }
        names, towers = placed(folder, *((part, rules) for _, part, rules in encoders), (folder, _rest()))
        template = chat_template(language, TEMPLATES, llama3="llama3")
        return Reading(meant, names, towers, chat_template=template)

    @classmethod
    def write(cls, config: VlmixConfig) -> Writing:
        """Only the way back of a folder that was read: the layout has no place for encoders.

        Raises:
            CheckpointError: always.

        """
        raise CheckpointError(
            "Cambrian's folders hold no encoders, and its code takes them from the hub. A model made from "
            "such a folder by `vlmix convert` is written back; another cannot be"
        )


def _check(folder: PublishedFolder) -> None:
    config = folder.config
    if config.get("mm_projector_type") != "sva":
        raise CheckpointError(
            f"{folder.folder}: mm_projector_type {config.get('mm_projector_type')!r}: only sva is known"
        )
    side = required(folder, "image_token_len")
    if list(required(folder, "query_num_list")) != [side]:
        raise CheckpointError(
            f"{folder.folder}: query groups of {config['query_num_list']}; only one of image_token_len "
            f"{side} has a counterpart"
        )
    inside = [name for name in folder.tensors if name.startswith(_INSIDE_TOWERS)]
    if inside:
        raise CheckpointError(
            f"{folder.folder}: holds encoders that were trained along ({inside[0]}), which the authors' own "
            "code does not load again. Save them in folders of their own, name these with --tower NAME=DIR, "
            "and leave the tensors out"
        )


def _inside(config: Mapping[str, Any]) -> dict[str, Any] | None:
    if config.get("connector_only", True):
        return None
    start, stride, count = (
        int(config[f"{what}_of_vision_sampler_layers"]) for what in ("start", "stride", "num")
    )
    return {"after": [start + stride * i for i in range(count)], "width": int(config["hidden_size"])}


def _encoder(folder: PublishedFolder, index: int, name: str, side: int) -> Found:
    """One encoder's settings, folder and rules; its kind is told by its tensors, its size by the config."""
    ours = f"model.encoders.{index}.tower."
    beside = folder.tower(name)
    if beside is None:
        raise CheckpointError(
            f"{folder.folder}: its encoder {name!r} lies in no folder of that name beside it. Say where it "
            f"is with --tower {name}=DIR (SigLIP, CLIP and DINOv2 in transformers' names)"
        )
    settings, part, rules = _told_apart(folder, beside, name, ours)
    size = _SIZE.search(name)
    if size:
        settings |= {"image_size": int(size.group(1))}
    resample = {"grid": [side, side], "mode": "bilinear"}
    return {**settings, "resize": "bicubic_antialias", "resample": resample}, part, rules


def _told_apart(folder: PublishedFolder, beside: PublishedFolder, name: str, ours: str) -> Found:
    names = beside.tensors
    if any(key.endswith("embeddings.class_embedding") for key in names):
        tower, declared = clip_at(folder, "model.none.", name)
        layer = folder.config.get("mm_vision_select_layer", -2)
        clip = {**clip_settings(tower), "feature_layer": layer, **declared}
        return clip, tower.folder, clip_names(tower, ours, clip["layers"], clip_blocks(clip))
    if any(key.endswith("stem.0.weight") for key in names):
        aux = convnext_at(ConvnextTower(folder, "model.none.", "model.none."), name)
        stages = [0, 1, 2, 3] if _STAGES in name else [3]
        convnext = {**convnext_settings(aux, name), "image_size": _CONVNEXT_SIZE, "stages": stages}
        return convnext, aux.folder, convnext_names(aux, ours)
    if "embeddings.cls_token" in names:
        return _dinov2(beside.config), beside, _dinov2_names(ours)
    for prefix in ("vision_model.", ""):
        if f"{prefix}embeddings.position_embedding.weight" in names:
            return _siglip(beside), beside, _siglip_names(prefix, ours)
    raise CheckpointError(
        f"{beside.folder}: {name} is no SigLIP, CLIP or DINOv2 in transformers' names and no ConvNeXt"
    )


def _siglip(folder: PublishedFolder) -> dict[str, Any]:
    config = folder.config.get("vision_config", folder.config)
    return {
        "kind": "siglip",
        "image_size": config["image_size"],
        "patch_size": config["patch_size"],
        "width": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "mlp": config["intermediate_size"],
    }


def _siglip_names(prefix: str, ours: str) -> Names:
    return Names(
        (Rename(f"{prefix}{{rest}}", f"{ours}{{rest}}"),),
        (
            Unused(f"{prefix}head.{{rest}}", "the pooling head, which no feature passes through"),
            *(Unused(name, "the text side") for name in ("text_model.{rest}", "logit_scale", "logit_bias")),
        ),
    )


def _dinov2(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "kind": "dinov2",
        "image_size": config["image_size"],
        "table_size": config["image_size"],
        "patch_size": config["patch_size"],
        "width": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "mlp": int(config["mlp_ratio"] * config["hidden_size"]),
        "swiglu": config.get("use_swiglu_ffn", False),
    }


def _dinov2_names(ours: str) -> Names:
    layer = "encoder.layer.{n}.attention."
    return Names(
        (
            # Transformers 5 has new names for these, and still stores the old ones.
            *(
                Rename(f"{layer}{theirs}.{{rest}}", f"{ours}{layer}{new}.{{rest}}")
                for theirs, new in _DINOV2_ATTENTION
            ),
            Rename("{rest}", f"{ours}{{rest}}"),
        ),
        (Unused("embeddings.mask_token", "only pre-training uses it"),),
    )


def _rest() -> Names:
    layers = (
        ("model.vision_sampler_0.layers.{a}.", "model.fusion.layers.{a}."),
        ("model.vision_sampler_layers.{a}.layers.0.", "model.fusion.inside.{a}."),
    )
    return (
        Names(
            (
                *(Rename(before + theirs, into + ours) for before, into in layers for theirs, ours in _LAYER),
                Rename("model.mm_projector_aux_{n}.{rest}", "model.fusion.inputs.{n}.{rest}"),
                Rename("model.vision_query", "model.fusion.query"),
                Rename("model.image_newline", "model.views.newline"),
                Rename("model.mm_projector.{rest}", "model.projector.layers.{rest}"),
            )
        )
        + LANGUAGE
    )
