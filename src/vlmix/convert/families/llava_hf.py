"""LLaVA as transformers stores it: ``LlavaForConditionalGeneration``, in its old and its new tensor names."""

from __future__ import annotations

from typing import Any

from vlmix.convert._family import FAMILIES, Family, Reading, Writing
from vlmix.convert._llava_parts import architecture, clip_settings, clip_unused, parts_are
from vlmix.convert._names import Names, Rename
from vlmix.convert._source import PublishedFolder
from vlmix.core.errors import CheckpointError
from vlmix.models.configuration import VlmixConfig

_CLASS = "LlavaForConditionalGeneration"
_OURS = "model.encoders.0.tower."
# From 4.52 on the parts lay under `model.` with the head beside them; 5 stores the first layout again, and
# CLIP without `vision_model.`.
_FIRST = "vision_tower.vision_model."
_TOWERS = ("model.vision_tower.vision_model.", "model.vision_tower.", _FIRST, "vision_tower.")


@FAMILIES.register("llava_hf")
class LlavaHf(Family):
    """Folders of transformers' own class, on a CLIP tower."""

    @classmethod
    def recognises(cls, folder: PublishedFolder) -> bool:
        """The class, and a projector of two named layers."""
        return architecture(folder) == _CLASS and any(".linear_1.weight" in name for name in folder.tensors)

    @classmethod
    def read(cls, folder: PublishedFolder) -> Reading:
        """Sizes from the towers' own configs where they say them, else from shapes."""
        config = folder.config
        strategy = config.get("vision_feature_select_strategy", "default")
        if strategy != "default":
            raise CheckpointError(
                f"vision_feature_select_strategy {strategy!r}: only `default` has a counterpart"
            )
        vision = config.get("vision_config", {})
        if vision.get("model_type", "clip_vision_model") != "clip_vision_model":
            raise CheckpointError(f"a {vision['model_type']} tower has no counterpart in this family yet")
        found = [tower for tower in _TOWERS if f"{tower}embeddings.class_embedding" in folder.tensors]
        if not found:
            raise CheckpointError(f"{folder.folder}: its CLIP tower is missing")
        prefix = found[0]
        clip = {**clip_settings(folder, prefix), "feature_layer": config.get("vision_feature_layer", -2)}
        for ours, theirs in (("heads", "num_attention_heads"), ("activation", "hidden_act")):
            if theirs in vision:
                clip[ours] = vision[theirs]
        if config.get("projector_hidden_act", "gelu") != "gelu":
            raise CheckpointError(
                f"projector_hidden_act {config['projector_hidden_act']!r}: only gelu is known"
            )
        meant = {
            "text_config": config["text_config"],
            "encoders": [clip],
            "fusion": {"kind": "single"},
            "projector": {"kind": "mlp"},
            "image_size": clip["image_size"],
            "image_token_id": config.get("image_token_index", config.get("image_token_id", 32000)),
        }
        return Reading(meant, _names(clip, prefix, new=prefix.startswith("model.")), fit="crop")

    @classmethod
    def write(cls, config: VlmixConfig) -> Writing:
        """The names of the files on the hub, which every version of transformers reads."""
        (clip,) = parts_are(config, ["clip"], "single", "LLaVA")
        settings = config.projector_settings().model_dump()
        if settings["kind"] != "mlp" or settings["depth"] != 2 or clip["class_token"] != "drop_after":
            raise CheckpointError(
                "transformers' LLaVA has a projector of two layers and keeps CLIP's class token"
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
        flat = {
            "architectures": [_CLASS],
            "model_type": "llava",
            "text_config": config.language.to_dict(),
            "vision_config": vision,
            "vision_feature_layer": clip["feature_layer"],
            "vision_feature_select_strategy": "default",
            "projector_hidden_act": "gelu",
            "image_token_index": config.image_token_id,
            "image_seq_length": config.image_seq_length,
        }
        return Writing(flat, _names(clip, _FIRST, new=False))


def _names(clip: dict[str, Any], prefix: str, *, new: bool) -> Names:
    layer = int(clip["feature_layer"])
    blocks = layer if layer >= 0 else clip["layers"] + 1 + layer
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
            Rename(f"{outer}multi_modal_projector.linear_1.{{rest}}", "model.projector.layers.0.{rest}"),
            Rename(f"{outer}multi_modal_projector.linear_2.{{rest}}", "model.projector.layers.2.{rest}"),
            *language,
        ),
        clip_unused(prefix, clip["layers"], blocks),
    )
