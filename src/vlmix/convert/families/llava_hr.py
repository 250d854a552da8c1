"""LLaVA-HR (arXiv:2403.03003): a ConvNeXt enters CLIP's backbone through three adapters."""

from __future__ import annotations

from typing import Any

from vlmix.convert._family import Family, Reading, Writing
from vlmix.convert._llava_parts import (
    LANGUAGE,
    TEMPLATES,
    chat_template,
    check_settled,
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
    ConvnextTower,
    clip_at,
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

_TOWER = "model.vision_tower."
_FAST = f"{_TOWER}fast_vision_tower.vision_tower.vision_model."
_SLOW = f"{_TOWER}slow_vision_tower.vision_tower."
_OURS = ("model.encoders.0.tower.", "model.encoders.1.tower.")
_STRIDE, _PATCH, _LEAST = 32, 14, 336


@FAMILIES.register("llava_hr")
class LlavaHr(Family):
    """Folders written by LLaVA-HR's own classes, of either stage."""

    @classmethod
    def recognises(cls, folder: PublishedFolder) -> bool:
        """A slow and a fast tower and the layers that join them."""
        return any(name.startswith(f"{_TOWER}align_stages.") for name in folder.tensors)

    @classmethod
    def read(cls, folder: PublishedFolder) -> Reading:
        """CLIP gets the picture at the size where its patches meet the ConvNeXt's cells, 336 at least."""
        config, language = folder.config, language_config(folder)
        size = int(required(folder, "input_image_size"))
        fast, declared = clip_at(folder, _FAST, str(config.get("mm_vision_tower", "")))
        clip = clip_settings(fast)
        clip |= {
            "table_size": clip["image_size"],
            "image_size": max(size * _PATCH // _STRIDE, _LEAST),
            "feature_layer": -1,
            "class_token": "drop_before",
            "resize": "bilinear_corners",
            **declared,
        }
        name = str(config.get("vision_tower_slow", ""))
        slow = convnext_at(ConvnextTower.below(folder, _SLOW), name)
        convnext = {**convnext_settings(slow, name), "image_size": size, "stages": [3]}
        adapted = any(name.startswith(f"{_TOWER}align_stages_latent.") for name in folder.tensors)
        fusion: dict[str, Any] = {"kind": "mixture_of_resolution", **({} if adapted else {"after": []})}
        meant = {
            "text_config": language,
            "encoders": [clip, convnext],
            "fusion": fusion,
            "projector": {**projector(config)[0], **visual_scale(language)},
            "image_size": size,
        }
        names, towers = placed(
            folder,
            (fast.folder, clip_names(fast, _OURS[0], clip["layers"], clip["layers"])),
            (slow.folder, convnext_names(slow, _OURS[1])),
            (folder, _rest(config)),
        )
        template = chat_template(language, TEMPLATES, llama3="llama3")
        return Reading(meant, names, towers, chat_template=template, fit=fit(config))

    @classmethod
    def write(cls, config: VlmixConfig) -> Writing:
        """CLIP without class token, the last stage of a ConvNeXt, adapters after three quarters or none."""
        clip, convnext = parts_are(config, ["clip", "convnext"], "mixture_of_resolution", "LLaVA-HR")
        quarters = [clip["layers"] * part // 4 for part in (1, 2, 3)]
        after = config.fusion_settings().model_dump()["after"]
        settled = {
            "encoders.0": (
                clip,
                {"class_token": "drop_before", "feature_layer": -1, "resize": "bilinear_corners"},
            ),
            "encoders.1": (convnext, {"stages": [3]}),
        }
        check_settled(settled, "LLaVA-HR")
        if after is not None and list(after) not in ([], quarters):
            raise CheckpointError(
                f"LLaVA-HR's adapters stand after {quarters} or nowhere, not after {list(after)}"
            )
        own = {
            "is_multipath_encoder": True,
            "input_image_size": convnext["image_size"],
            "freeze_vision": after is not None and not after,
            "mm_vision_select_layer": -2,
            "mm_vision_tower": clip["weights"] or "",
            "vision_tower_slow": convnext["weights"] or "",
        }
        flat = flat_config(config, written_class(config, "Llava{}ForCausalLM"), "llava", own)
        slow = written_convnext(f"{_SLOW}stem.", f"{_SLOW}stages.", "", _OURS[1])
        return Writing(flat, written_clip(_FAST, _OURS[0]) + slow + _rest(flat))


def _rest(config: Any) -> Names:
    return (
        Names(
            (
                Rename(f"{_TOWER}align_stages_latent.{{n}}.{{rest}}", "model.fusion.adapters.{n}.{rest}"),
                Rename(f"{_TOWER}align_stages.0.{{rest}}", "model.fusion.{rest}"),
                projector(config)[1],
            )
        )
        + LANGUAGE
    )
