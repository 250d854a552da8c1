"""LLaVA-1.5 (arXiv:2310.03744) and 1.6: CLIP's tokens, of pictures in tiles since 1.6, projector, decoder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vlmix.convert._family import Family, Reading, Writing
from vlmix.convert._llava_parts import (
    LANGUAGE,
    TEMPLATES,
    architecture,
    chat_template,
    flat_config,
    language_config,
    parts_are,
    projector,
    required,
    visual_scale,
    written_class,
)
from vlmix.convert._names import Names, Rename
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
from vlmix.models.image_processing import Fit

_OURS, _STAGES = "model.encoders.0.tower.", "model.vision_tower.align_stages"


@FAMILIES.register("llava")
class Llava(Family):
    """Folders written by LLaVA's own classes, of either stage."""

    @classmethod
    def recognises(cls, folder: PublishedFolder) -> bool:
        """A class or type named after LLaVA, a projector, and neither a second tower nor adapters."""
        names = folder.tensors
        other = any(
            name.startswith(("model.vlm_uni_", "model.vision_tower_aux", "model.vision_tower.slow_", _STAGES))
            for name in names
        )
        # The first stage leaves the class of the decoder it started from.
        kind = str(folder.config.get("model_type", ""))
        plain = (architecture(folder).startswith("Llava") or kind.startswith("llava")) and not other
        return plain and any(name.startswith("model.mm_projector.") for name in names)

    @classmethod
    def read(cls, folder: PublishedFolder) -> Reading:
        """The tower lies in the folder, or where ``mm_vision_tower`` points."""
        config, language = folder.config, language_config(folder)
        if config.get("mm_vision_select_feature", "patch") != "patch":
            raise CheckpointError("mm_vision_select_feature: only `patch` has a counterpart here")
        tower, declared = clip_at(folder, CLIP, str(config.get("mm_vision_tower", "")))
        clip = {
            **clip_settings(tower),
            "feature_layer": config.get("mm_vision_select_layer", -2),
            **declared,
        }
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
        fit: Fit = "pad" if config.get("image_aspect_ratio") == "pad" else "crop"
        template = chat_template(language, TEMPLATES, llama3="llama3")
        return Reading(meant, names, towers, chat_template=template, fit=fit)

    @classmethod
    def write(cls, config: VlmixConfig) -> Writing:
        """One CLIP tower, its tokens as they are."""
        (clip,) = parts_are(config, ["clip"], "single", "LLaVA", views=("whole", "anyres"))
        if clip["class_token"] != "drop_after":
            raise CheckpointError(
                "LLaVA keeps the class token through CLIP's blocks; this model drops it before"
            )
        own = {
            "mm_vision_select_layer": clip_blocks(clip),
            "mm_vision_tower": clip["weights"] or "",
            **_tiles(config, clip),
        }
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
    side = clip["image_size"]
    merge = config.get("mm_patch_merge_type", "flat")
    return {"kind": "anyres", "canvases": [[h // side, w // side] for w, h in points], "merge": merge}


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
    return Names((projector(config)[1], Rename("model.image_newline", "model.views.newline"))) + LANGUAGE
