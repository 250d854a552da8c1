"""Mini-Gemini, later MGM (arXiv:2403.18814): CLIP asks, ConvNeXt answers, patch by patch."""

from __future__ import annotations

from typing import Any

from vlmix.convert._family import FAMILIES, Family, Reading, Writing
from vlmix.convert._llava_parts import (
    CLIP,
    LANGUAGE_NAMES,
    LANGUAGE_UNUSED,
    clip_settings,
    clip_unused,
    convnext_settings,
    declared_clip,
    flat_config,
    language_config,
    named_tower,
    parts_are,
    projector,
    written_class,
)
from vlmix.convert._names import Names, Rename
from vlmix.convert._source import PublishedFolder
from vlmix.core.errors import CheckpointError
from vlmix.models.configuration import VlmixConfig

_AUX = "model.vision_tower_aux."
_TEMPLATES = {"gemma": "gemma", "mixtral": "mistral_mgm", "mistral": "mistral_mgm", "llama": "vicuna"}


@FAMILIES.register("mini_gemini")
class MiniGemini(Family):
    """Folders written by either generation of the authors' classes, with both encoders inside."""

    @classmethod
    def recognises(cls, folder: PublishedFolder) -> bool:
        """The projections of patch mining; both class names, and no ``model_type``, are seen in the wild."""
        return any(name.startswith("model.vlm_uni_query_projector.") for name in folder.tensors)

    @classmethod
    def read(cls, folder: PublishedFolder) -> Reading:
        """Sizes from shapes; the low-resolution picture is made from the high one without antialiasing."""
        config = folder.config
        if int(config.get("image_grid", 1)) != 1 or config.get("image_global"):
            raise CheckpointError(
                f"{folder.folder}: HD tiling (image_grid {config['image_grid']}) has no counterpart yet"
            )
        if not any(name.startswith(CLIP) for name in folder.tensors):
            raise CheckpointError(f"{folder.folder}: holds no CLIP tower; stage-1 files are not read yet")
        clip = {
            **clip_settings(folder, CLIP),
            "feature_layer": config.get("mm_vision_select_layer", -2),
            "resize": "bilinear",
            **declared_clip(named_tower(folder, str(config.get("mm_vision_tower", "")))),
        }
        convnext = convnext_settings(folder, f"{_AUX}vision_stem.", f"{_AUX}vision_stages.")
        convnext |= {"image_size": config["image_size_aux"], "stages": [0, 1, 2, 3], "drop_path": 0.1}
        language = language_config(folder)
        meant = {
            "text_config": language,
            "encoders": [clip, convnext],
            "fusion": {"kind": "patch_mining"},
            "projector": projector(config)[0],
            "image_size": config["image_size_aux"],
        }
        template = (
            "llama3_mgm" if int(language["vocab_size"]) == 128256 else _TEMPLATES[language["model_type"]]
        )
        return Reading(meant, _names(clip, config), chat_template=template)

    @classmethod
    def write(cls, config: VlmixConfig) -> Writing:
        """CLIP, all four stages of a ConvNeXt, patch mining with one head."""
        clip, convnext = parts_are(config, ["clip", "convnext"], "patch_mining", "Mini-Gemini")
        if config.fusion_settings().model_dump()["heads"] != 1 or convnext["stages"] != [0, 1, 2, 3]:
            raise CheckpointError("Mini-Gemini mines all four stages with one head; this model does not")
        own = {
            "mm_vision_select_layer": clip["feature_layer"],
            "mm_vision_tower": clip["weights"] or "",
            "mm_vision_tower_aux": convnext["weights"] or "",
            "mm_hidden_size_aux": sum(convnext["widths"]),
            "image_size_aux": convnext["image_size"],
            "image_grid": 1,
            "image_global": False,
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
        return Writing(flat, _names(clip, flat))


def _names(clip: dict[str, Any], config: Any) -> Names:
    layer = int(clip["feature_layer"])
    blocks = layer if layer >= 0 else clip["layers"] + 1 + layer
    return Names(
        (
            Rename(f"{CLIP}{{rest}}", "model.encoders.0.tower.{rest}"),
            Rename(f"{_AUX}vision_stem.{{rest}}", "model.encoders.1.tower.stem.{rest}"),
            Rename(f"{_AUX}vision_stages.{{rest}}", "model.encoders.1.tower.stages.{rest}"),
            Rename("model.vlm_uni_query_projector.{rest}", "model.fusion.query.{rest}"),
            Rename("model.vlm_uni_aux_projector.{rest}", "model.fusion.key.{rest}"),
            Rename("model.vlm_uni_val_projector.{rest}", "model.fusion.value.{rest}"),
            projector(config)[1],
            *LANGUAGE_NAMES,
        ),
        (*LANGUAGE_UNUSED, *clip_unused(CLIP, clip["layers"], blocks)),
    )
