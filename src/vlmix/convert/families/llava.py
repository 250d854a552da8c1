"""LLaVA-1.5 (arXiv:2310.03744) and 1.6: CLIP's tokens, of pictures in tiles since 1.6, projector, decoder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vlmix.convert._family import Family, Reading, Writing
from vlmix.convert._llava_parts import (
    FEATURES,
    LANGUAGE,
    TEMPLATES,
    architecture,
    canvases,
    chat_template,
    class_token,
    fit,
    flat_config,
    language_config,
    parts_are,
    projector,
    required,
    visual_scale,
    written_class,
)
from vlmix.convert._names import Names, Rename, Unused
from vlmix.convert._source import PublishedFolder
from vlmix.convert._towers import (
    CLIP,
    clip_at,
    clip_blocks,
    clip_names,
    clip_settings,
    placed,
    written_clip,
)
from vlmix.convert.registry import FAMILIES
from vlmix.core.errors import CheckpointError
from vlmix.models.configuration import VlmixConfig

_OURS = "model.encoders.0.tower."
_OTHERS = (
    "model.vlm_uni_",
    "model.vision_tower_aux",
    "model.vision_tower.slow_",
    "model.vision_tower.align_stages",
    "model.vision_tower.vision_towers.",
    "model.mm_projector.image_spatial_proj.",
)
_KIN = ("llava", "eagle")  # Eagle's class with a single tower of OpenAI's is LLaVA's


@FAMILIES.register("llava")
class Llava(Family):
    """Folders written by LLaVA's own classes, of either stage."""

    @classmethod
    def recognises(cls, folder: PublishedFolder) -> bool:
        """A class or type named after LLaVA, a projector, and neither a second tower nor adapters."""
        listed = ";" in str(folder.config.get("mm_vision_tower", ""))
        if listed or any(name.startswith(_OTHERS) for name in folder.tensors):
            return False
        # The first stage leaves the class of the decoder it started from.
        called = (architecture(folder), str(folder.config.get("model_type", "")))
        kin = any(name.lower().startswith(_KIN) for name in called)
        bare = folder.config.get("mm_projector_type") == "identity"
        return kin and (bare or any(name.startswith("model.mm_projector.") for name in folder.tensors))

    @classmethod
    def read(cls, folder: PublishedFolder) -> Reading:
        """The tower lies in the folder, or where ``mm_vision_tower`` points."""
        config, language = folder.config, language_config(folder)
        if config.get("s2"):
            raise CheckpointError(f"{folder.folder}: s2, one picture at several scales, has no counterpart")
        tower, declared = clip_at(folder, CLIP, str(config.get("mm_vision_tower", "")))
        clip = {
            **clip_settings(tower),
            "feature_layer": config.get("mm_vision_select_layer", -2),
            "class_token": class_token(config),
            **declared,
        }
        if "input_image_size" in config:  # LLaVA-HR's code with CLIP alone, which runs it at any size
            clip |= {"table_size": clip["image_size"], "image_size": int(config["input_image_size"])}
        names, towers = placed(
            folder,
            (tower.folder, clip_names(tower, _OURS, clip["layers"], clip_blocks(clip))),
            (folder, _rest(config)),
        )
        meant = {
            "text_config": language,
            "encoders": [clip],
            "views": _views(folder, clip),
            "fusion": {"kind": "single"},
            "projector": {**projector(config)[0], **visual_scale(language)},
            "image_size": clip["image_size"],
        }
        template = chat_template(language, TEMPLATES, llama3="llama3")
        return Reading(meant, names, towers, chat_template=template, fit=fit(config))

    @classmethod
    def write(cls, config: VlmixConfig) -> Writing:
        """One CLIP tower, its tokens as they are."""
        (clip,) = parts_are(config, ["clip"], "single", "LLaVA", views=("whole", "anyres"))
        features = {kept: name for name, kept in FEATURES.items()}
        if clip["class_token"] not in features:
            raise CheckpointError(
                "LLaVA keeps the class token through CLIP's blocks; this model drops it before"
            )
        own = {
            "mm_vision_select_layer": clip_blocks(clip),
            "mm_vision_select_feature": features[clip["class_token"]],
            "mm_vision_tower": clip["weights"] or "",
            **_tiles(config, clip),
        }
        if clip["table_size"] not in (None, clip["image_size"]):
            own |= {"input_image_size": clip["image_size"], "is_multipath_encoder": False}
        kind = config.language.model_type
        flat = flat_config(config, written_class(config, "Llava{}ForCausalLM"), f"llava_{kind}", own)
        return Writing(flat, written_clip(CLIP, _OURS) + _rest(flat))


def _views(folder: PublishedFolder, clip: dict[str, Any]) -> dict[str, Any]:
    """The canvases of LLaVA-1.6, which its own code gives as (width, height) in pixels."""
    config = folder.config
    fit = str(config.get("image_aspect_ratio", ""))
    if not fit.startswith("anyres"):
        return {"kind": "whole"}
    if fit != "anyres":
        raise CheckpointError(f"{folder.folder}: image_aspect_ratio {fit!r} has no counterpart; anyres has")
    points = required(folder, "image_grid_pinpoints")
    if isinstance(points, str):  # as it stood on the command line that trained the model
        points = json.loads(points.replace("(", "[").replace(")", "]"))
    grids = canvases([(height, width) for width, height in points], clip["image_size"])
    return {"kind": "anyres", "canvases": grids, "merge": config.get("mm_patch_merge_type", "flat")}


def _tiles(config: VlmixConfig, clip: Mapping[str, Any]) -> dict[str, Any]:
    views, side = config.view_settings().model_dump(mode="json"), clip["image_size"]
    if views["kind"] == "whole":
        return {}
    if views["budget"] is not None:
        raise CheckpointError("LLaVA-1.6 knows no budget of tokens; this model's views have one")
    return {
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": views["merge"],
        "image_grid_pinpoints": [[columns * side, rows * side] for rows, columns in views["canvases"]],
    }


def _rest(config: Mapping[str, Any]) -> Names:
    newline = "model.image_newline"
    views = Names(
        (Rename(newline, "model.views.newline"),),
        (Unused(newline, "ends rows of tiles without their padding, which this model has not"),),
    )
    return views + Names((projector(config)[1],)) + LANGUAGE
