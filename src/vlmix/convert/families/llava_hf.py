"""LLaVA as transformers stores it, in its old and its new tensor names.

``LlavaForConditionalGeneration`` and, with pictures in tiles, ``LlavaNextForConditionalGeneration``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmix.convert._family import Family, Reading, Writing
from vlmix.convert._llava_parts import TEMPLATES, architecture, canvases, chat_template, parts_are
from vlmix.convert._names import Names, Rename
from vlmix.convert._source import PublishedFolder
from vlmix.convert._towers import Tower, clip_blocks, clip_settings, clip_unused
from vlmix.convert.registry import FAMILIES
from vlmix.core.errors import CheckpointError
from vlmix.models.configuration import VlmixConfig

_CLASS, _NEXT = "LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration"
_STRATEGIES = {"default": "drop_after", "full": "keep"}
_OURS = "model.encoders.0.tower."
# From 4.52 on the parts lay under `model.` with the head beside them; 5 stores the first layout again, and
# CLIP without `vision_model.`.
_FIRST = "vision_tower.vision_model."
_TOWERS = ("model.vision_tower.vision_model.", "model.vision_tower.", _FIRST, "vision_tower.")


@FAMILIES.register("llava_hf")
class LlavaHf(Family):
    """Folders of transformers' own classes, on a CLIP tower."""

    @classmethod
    def recognises(cls, folder: PublishedFolder) -> bool:
        """The class, and a projector of two named layers."""
        known = architecture(folder) in (_CLASS, _NEXT)
        return known and any(".linear_1.weight" in name for name in folder.tensors)

    @classmethod
    def read(cls, folder: PublishedFolder) -> Reading:
        """Sizes from the towers' own configs where they say them, else from shapes."""
        config = folder.config
        strategy = config.get("vision_feature_select_strategy", "default")
        if strategy not in _STRATEGIES:
            raise CheckpointError(f"vision_feature_select_strategy {strategy!r} has no counterpart")
        vision = config.get("vision_config", {})
        if vision.get("model_type", "clip_vision_model") != "clip_vision_model":
            raise CheckpointError(f"a {vision['model_type']} tower has no counterpart in this family yet")
        found = [tower for tower in _TOWERS if f"{tower}embeddings.class_embedding" in folder.tensors]
        if not found:
            raise CheckpointError(f"{folder.folder}: its CLIP tower is missing")
        prefix = found[0]
        clip = clip_settings(Tower(folder, prefix))
        clip |= {"feature_layer": _layer(config), "class_token": _STRATEGIES[strategy]}
        for ours, theirs in (("heads", "num_attention_heads"), ("activation", "hidden_act")):
            if theirs in vision:
                clip[ours] = vision[theirs]
        if config.get("projector_hidden_act", "gelu") != "gelu":
            raise CheckpointError(
                f"projector_hidden_act {config['projector_hidden_act']!r}: only gelu is known"
            )
        language = _language(folder)
        meant = {
            "text_config": language,
            "encoders": [clip],
            "views": _views(folder, clip),
            "fusion": {"kind": "single"},
            "projector": {"kind": "mlp", "bias": config.get("multimodal_projector_bias", True)},
            "image_size": clip["image_size"],
            "image_token_id": config.get("image_token_index", config.get("image_token_id", 32000)),
        }
        names = _names(clip, prefix, new=prefix.startswith("model."))
        template = chat_template(language, TEMPLATES, llama3="llama3")
        return Reading(meant, names, chat_template=template, fit="crop")

    @classmethod
    def write(cls, config: VlmixConfig) -> Writing:
        """The names of the files on the hub, which every version of transformers reads."""
        (clip,) = parts_are(config, ["clip"], "single", "LLaVA", views=("whole", "anyres"))
        settings = config.projector_settings().model_dump()
        strategies = {kept: name for name, kept in _STRATEGIES.items()}
        if settings["kind"] != "mlp" or settings["depth"] != 2 or clip["class_token"] not in strategies:
            raise CheckpointError(
                "transformers' LLaVA has a projector of two layers and keeps CLIP's class token in its blocks"
            )
        vision = {
            "model_type": "clip_vision_model",
            "hidden_size": clip["width"],
            "intermediate_size": clip["mlp"],
            "num_hidden_layers": clip["layers"],
            "num_attention_heads": clip["heads"],
            "image_size": clip["image_size"],
            "patch_size": clip["patch_size"],
            "hidden_act": clip["activation"],
        }
        views = config.view_settings().model_dump(mode="json")
        own: dict[str, Any] = {"architectures": [_CLASS], "model_type": "llava"}
        if views["kind"] == "anyres":
            own = {"architectures": [_NEXT], "model_type": "llava_next", **_pinpoints(views, clip)}
        flat = {
            **own,
            "text_config": config.language.to_dict(),
            "vision_config": vision,
            "vision_feature_layer": clip_blocks(clip),
            "vision_feature_select_strategy": strategies[clip["class_token"]],
            "projector_hidden_act": "gelu",
            "multimodal_projector_bias": settings["bias"],
            "tie_word_embeddings": config.tie_word_embeddings,
            "image_token_index": config.image_token_id,
            "image_seq_length": config.plan().projected.tokens,
        }
        return Writing(flat, _names(clip, _FIRST, new=False))


def _layer(config: Mapping[str, Any]) -> int:
    """The layer that is read; transformers also takes a list, and joins their channels."""
    found = config.get("vision_feature_layer", -2)
    layers = found if isinstance(found, list) else [found]
    if len(layers) != 1:
        raise CheckpointError(f"vision_feature_layer {found}: only one layer has a counterpart")
    return int(layers[0])


def _language(folder: PublishedFolder) -> dict[str, Any]:
    """The decoder's config; a head that is not stored is the embeddings, wherever the config says so."""
    found = dict(folder.config.get("text_config", {}))
    tied = not any(name.endswith("lm_head.weight") for name in folder.tensors)
    return {"model_type": "llama", **found, **({"tie_word_embeddings": True} if tied else {})}


def _views(folder: PublishedFolder, clip: dict[str, Any]) -> dict[str, Any]:
    """The canvases of LLaVA-NeXT, which transformers gives as (height, width) in pixels."""
    if architecture(folder) == _CLASS:
        return {"kind": "whole"}
    points = folder.config.get("image_grid_pinpoints")
    given = {} if points is None else {"canvases": canvases(points, clip["image_size"])}
    return {"kind": "anyres", **given}


def _pinpoints(views: dict[str, Any], clip: dict[str, Any]) -> dict[str, Any]:
    if views["merge"] != "spatial_unpad" or views["budget"] is not None:
        raise CheckpointError("transformers' LLaVA-NeXT leaves padding out and knows no budget of tokens")
    side = clip["image_size"]
    return {"image_grid_pinpoints": [[rows * side, columns * side] for rows, columns in views["canvases"]]}


def _names(clip: dict[str, Any], prefix: str, *, new: bool) -> Names:
    outer = "model." if new else ""
    language = (
        (
            Rename("lm_head.{rest}", "model.language_model.lm_head.{rest}"),
            Rename("model.language_model.{rest}", "model.language_model.model.{rest}"),
        )
        if new
        else (Rename("language_model.{rest}", "model.language_model.{rest}"),)
    )
    return Names(
        (
            Rename(f"{prefix}{{rest}}", f"{_OURS}{{rest}}"),
            Rename(f"{outer}image_newline", "model.views.newline"),
            Rename(f"{outer}multi_modal_projector.linear_1.{{rest}}", "model.projector.layers.0.{rest}"),
            Rename(f"{outer}multi_modal_projector.linear_2.{{rest}}", "model.projector.layers.2.{rest}"),
            *language,
        ),
        clip_unused(prefix, clip["layers"], clip_blocks(clip)),
    )
