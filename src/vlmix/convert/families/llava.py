"""LLaVA-1.5 (arXiv:2310.03744): CLIP's tokens, a projector, a decoder."""

from __future__ import annotations

from typing import Any

from vlmix.convert._family import FAMILIES, Family, Reading, Writing
from vlmix.convert._llava_parts import (
    CLIP,
    LANGUAGE_NAMES,
    LANGUAGE_UNUSED,
    TEXT_SIDE,
    architecture,
    clip_prefix,
    clip_settings,
    clip_unused,
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
from vlmix.models.image_processing import Fit

_OURS = "model.encoders.0.tower."


@FAMILIES.register("llava")
class Llava(Family):
    """Folders written by LLaVA's own classes."""

    @classmethod
    def recognises(cls, folder: PublishedFolder) -> bool:
        """A class named ``Llava…`` with a projector and neither a second tower nor adapters."""
        names = folder.tensors
        other = any(
            name.startswith(("model.vlm_uni_", "model.vision_tower_aux", "model.vision_tower.slow_"))
            for name in names
        )
        plain = architecture(folder).startswith("Llava") and not other
        return plain and any(name.startswith("model.mm_projector.") for name in names)

    @classmethod
    def read(cls, folder: PublishedFolder) -> Reading:
        """The tower lies in the folder, or where ``mm_vision_tower`` points."""
        config = folder.config
        if config.get("mm_vision_select_feature", "patch") != "patch":
            raise CheckpointError("mm_vision_select_feature: only `patch` has a counterpart here")
        inside = any(name.startswith(CLIP) for name in folder.tensors)
        beside = named_tower(folder, str(config.get("mm_vision_tower", "")))
        if not inside and beside is None:
            raise CheckpointError(
                f"{folder.folder}: its CLIP tower {config.get('mm_vision_tower')!r} is neither inside nor "
                "a folder beside it. Put that model's folder there under this name"
            )
        tower = folder if inside or beside is None else beside
        prefix = CLIP if inside else clip_prefix(tower)
        clip = {**clip_settings(tower, prefix), "feature_layer": config.get("mm_vision_select_layer", -2)}
        clip |= declared_clip(beside)
        names, towers = cls._names(clip, prefix, config), ()
        if not inside:
            seen = Names(names.renames[:1], (*names.unused, *TEXT_SIDE))
            names, towers = Names(names.renames[1:], LANGUAGE_UNUSED), ((tower, seen),)
        meant = {
            "text_config": language_config(folder),
            "encoders": [clip],
            "fusion": {"kind": "single"},
            "projector": projector(config)[0],
            "image_size": clip["image_size"],
        }
        fit: Fit = "pad" if config.get("image_aspect_ratio") == "pad" else "crop"
        return Reading(meant, names, towers, chat_template="vicuna", fit=fit)

    @classmethod
    def write(cls, config: VlmixConfig) -> Writing:
        """One CLIP tower, its tokens as they are."""
        (clip,) = parts_are(config, ["clip"], "single", "LLaVA")
        if clip["class_token"] != "drop_after":
            raise CheckpointError(
                "LLaVA keeps the class token through CLIP's blocks; this model drops it before"
            )
        own = {"mm_vision_select_layer": clip["feature_layer"], "mm_vision_tower": clip["weights"] or ""}
        flat = flat_config(config, written_class(config, "Llava{}ForCausalLM"), "llava_llama", own)
        return Writing(flat, cls._names(clip, CLIP, flat))

    @classmethod
    def _names(cls, clip: dict[str, Any], prefix: str, config: Any) -> Names:
        layer = int(clip["feature_layer"])
        blocks = layer if layer >= 0 else clip["layers"] + 1 + layer
        return Names(
            (
                Rename(f"{prefix}{{rest}}", f"{_OURS}{{rest}}"),
                projector(config)[1],
                *LANGUAGE_NAMES,
            ),
            (*LANGUAGE_UNUSED, *clip_unused(prefix, clip["layers"], blocks)),
        )
