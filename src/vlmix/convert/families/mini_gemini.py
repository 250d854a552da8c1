"""Mini-Gemini, later MGM (arXiv:2403.18814): CLIP asks, ConvNeXt answers, patch by patch."""

from __future__ import annotations

from typing import Any

from vlmix.convert._family import Family, Reading, Writing
from vlmix.convert._llava_parts import (
    LANGUAGE,
    TEMPLATES,
    chat_template,
    check_settled,
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
from vlmix.convert._names import Names, Rename
from vlmix.convert._source import PublishedFolder
from vlmix.convert._towers import (
    CLIP,
    ConvnextTower,
    clip_at,
    clip_blocks,
    clip_names,
    clip_settings,
    convnext_at,
    convnext_names,
    convnext_settings,
    placed,
    written_clip,
    written_convnext,
)
from vlmix.convert.registry import FAMILIES
from vlmix.core.errors import CheckpointError
from vlmix.models.configuration import VlmixConfig

_AUX = "model.vision_tower_aux."
_STEM, _STAGES = f"{_AUX}vision_stem.", f"{_AUX}vision_stages."
_OURS = ("model.encoders.0.tower.", "model.encoders.1.tower.")
_TEMPLATES = {**TEMPLATES, "mistral": "mistral_mgm", "mixtral": "mistral_mgm"}


@FAMILIES.register("mini_gemini")
class MiniGemini(Family):
    """Folders written by either generation of the authors' classes, of either stage."""

    indexed = True  # patch mining's weights are looked up in the index, and without it are not loaded

    @classmethod
    def recognises(cls, folder: PublishedFolder) -> bool:
        """The projections of patch mining; both class names, and no ``model_type``, are seen in the wild."""
        return any(name.startswith("model.vlm_uni_query_projector.") for name in folder.tensors)

    @classmethod
    def read(cls, folder: PublishedFolder) -> Reading:
        """Sizes from shapes; the low-resolution picture is made from the high one without antialiasing."""
        config, language = folder.config, language_config(folder)
        tower, declared = clip_at(folder, CLIP, str(config.get("mm_vision_tower", "")))
        clip = {
            **clip_settings(tower),
            "feature_layer": config.get("mm_vision_select_layer", -2),
            "class_token": class_token(config, ("patch",)),
            "resize": "bilinear",
            **declared,
        }
        aux = convnext_at(ConvnextTower(folder, _STEM, _STAGES), str(config.get("mm_vision_tower_aux", "")))
        size = int(required(folder, "image_size_aux"))
        convnext = {
            **convnext_settings(aux, str(config.get("mm_vision_tower_aux", ""))),
            "image_size": size,
            "stages": [0, 1, 2, 3],
            "drop_path": 0.1,
        }
        views = _views(folder, clip)
        if views["kind"] == "hd":  # the high-resolution picture is never cut
            convnext["sees"] = "picture"
        meant = {
            "text_config": language,
            "encoders": [clip, convnext],
            "views": views,
            "fusion": {"kind": "patch_mining"},
            "projector": {**projector(config)[0], **visual_scale(language)},
            "image_size": size,
        }
        names, towers = placed(
            folder,
            (tower.folder, clip_names(tower, _OURS[0], clip["layers"], clip_blocks(clip))),
            (aux.folder, convnext_names(aux, _OURS[1])),
            (folder, _rest(config)),
        )
        template = chat_template(language, _TEMPLATES, llama3="llama3_mgm")
        return Reading(meant, names, towers, chat_template=template, fit=fit(config))

    @classmethod
    def write(cls, config: VlmixConfig) -> Writing:
        """CLIP, all four stages of a ConvNeXt, patch mining with one head."""
        clip, convnext = parts_are(
            config, ["clip", "convnext"], "patch_mining", "Mini-Gemini", views=("whole", "hd")
        )
        settled = {
            "encoders.0": (clip, {"class_token": "drop_after", "resize": "bilinear"}),
            "encoders.1": (convnext, {"stages": [0, 1, 2, 3]}),
            "fusion": (config.fusion_settings().model_dump(), {"heads": 1}),
        }
        check_settled(settled, "Mini-Gemini")
        own = {
            "mm_vision_select_layer": clip_blocks(clip),
            "mm_vision_tower": clip["weights"] or "",
            "mm_vision_tower_aux": convnext["weights"] or "",
            "mm_hidden_size_aux": sum(convnext["widths"]),
            "image_size_aux": convnext["image_size"],
            **_tiles(config, clip, convnext),
            "optimize_vision_tower": False,
            "optimize_vision_tower_aux": False,
        }
        kind = config.language.model_type
        flat = flat_config(
            config,
            written_class(config, "MGM{}ForCausalLM"),
            "mgm" if kind == "llama" else f"mgm_{kind}",
            own,
        )
        stages = written_convnext(_STEM, _STAGES, "", _OURS[1], scales="gamma")
        return Writing(flat, written_clip(CLIP, _OURS[0]) + stages + _rest(flat))


def _views(folder: PublishedFolder, clip: dict[str, Any]) -> dict[str, Any]:
    """The tiles of the HD models: as large as CLIP's own pictures."""
    grid, overview = int(folder.config.get("image_grid", 1)), bool(folder.config.get("image_global"))
    if grid == 1 and overview:
        raise CheckpointError(f"{folder.folder}: image_global with image_grid 1 has no meaning")
    if grid == 1:
        return {"kind": "whole"}
    return {"kind": "hd", "grid": grid, "tile_size": clip["image_size"], "overview": overview}


def _tiles(config: VlmixConfig, clip: dict[str, Any], convnext: dict[str, Any]) -> dict[str, Any]:
    views = config.view_settings().model_dump(mode="json")
    scopes = (clip["sees"], convnext["sees"])
    if views["kind"] == "whole":
        return {"image_grid": 1, "image_global": False}
    if scopes != ("views", "picture") or views["tile_size"] != clip["image_size"] or views["antialias"]:
        raise CheckpointError(
            "Mini-Gemini HD shows CLIP tiles of its own size, made without antialiasing, and ConvNeXt the "
            "whole picture; this model does not"
        )
    return {"image_grid": views["grid"], "image_global": views["overview"]}


def _rest(config: Any) -> Names:
    mining = {"query": "query", "aux": "key", "val": "value"}
    return (
        Names(
            (
                *(
                    Rename(f"model.vlm_uni_{theirs}_projector.{{rest}}", f"model.fusion.{ours}.{{rest}}")
                    for theirs, ours in mining.items()
                ),
                projector(config)[1],
            )
        )
        + LANGUAGE
    )
