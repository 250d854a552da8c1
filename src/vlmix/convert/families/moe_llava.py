"""MoE-LLaVA (arXiv:2401.15947): CLIP's or SigLIP's tokens, a projector, a decoder with DeepSpeed's experts.

Folders of all three stages; those before the experts hold the dense decoder.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from vlmix.convert._deepspeed import Network, expert_names, read_mixture, written_mixture
from vlmix.convert._family import Family, Reading, Writing
from vlmix.convert._llava_parts import (
    FEATURES,
    LANGUAGE,
    architecture,
    check_settled,
    class_token,
    fit,
    flat_config,
    language_config,
    parts_are,
    projector,
)
from vlmix.convert._names import Names, Rename
from vlmix.convert._qwen import KIND, QWEN, qwen_config
from vlmix.convert._qwen import LAYER as QWEN_LAYER
from vlmix.convert._qwen import NETWORK as QWEN_NETWORK
from vlmix.convert._siglip import siglip_at, siglip_names, siglip_settings, written_siglip
from vlmix.convert._source import PublishedFolder
from vlmix.convert._towers import (
    Section,
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

# Behind the name of the decoder's trunk.
_TOWER, _PROJECTOR = "image_tower.image_tower.vision_model.", "mm_projector.image_spatial_proj."
_OURS, _LAYER = "model.encoders.0.tower.", "model.layers.{n}."
_FIRST_QWEN, _TRUNKS = "QWen", ("model.", "transformer.")
# What stands in class names and types, and the decoder behind it.
_DECODERS = {
    "Stablelm": "stablelm",
    "Phi": "phi",
    "Mistral": "mistral",
    "Llama": "llama",
    _FIRST_QWEN: KIND,
    "Qwen1_5": "qwen2",
}
_MINICPM = "MiniCPM"
_CLASS = re.compile(f"({'|'.join((*_DECODERS, _MINICPM))})ForCausalLM")
# A decoder's folder of its own, and its class here.
_OWN_TYPES = {"stablelm_epoch": "Stablelm", "qwen": _FIRST_QWEN, "minicpm": _MINICPM}
_STABLELM = {"norm_eps": "layer_norm_eps", "rope_pct": "partial_rotary_factor"}
_NOT_LANGUAGE = re.compile(r"moe$|lora$|video_")
_NETWORKS = {"Phi": Network(("fc1",), "fc2", bias=True)}
_TEMPLATES = {"stablelm": "phi", "phi": "phi", "qwen2": "phi"}
_OPENCHAT = 32002  # Mistral's vocabulary and the two tokens OpenChat ends turns with
_SIGLIP_FEATURES = {"patch": True, "cls_patch": False}


@FAMILIES.register("moe_llava")
class MoeLlava(Family):
    """Folders written by MoE-LLaVA's own classes, of any of the three stages."""

    @classmethod
    def recognises(cls, folder: PublishedFolder) -> bool:
        """A projector made for pictures beside films, which no other descendant of LLaVA has."""
        return any(_PROJECTOR in name for name in folder.tensors)

    @classmethod
    def read(cls, folder: PublishedFolder) -> Reading:
        """The tower lies in the folder, or where ``mm_image_tower`` points."""
        config, called = folder.config, _called(folder)
        if config.get("mm_video_tower"):
            raise CheckpointError(f"{folder.folder}: mm_video_tower: films have no counterpart")
        language, trunk = _language(folder, called), _trunk(called)
        tower, section = _tower(folder, trunk)
        names, towers = placed(folder, section, (folder, _rest(config, called)))
        meant = {
            "text_config": language,
            "encoders": [tower],
            "fusion": {"kind": "single"},
            "projector": _projector(config, trunk)[0],
            "image_size": tower["image_size"],
            "experts": [read_mixture(config["moe"])] if _sparse(folder) else None,
        }
        template = _TEMPLATES.get(language["model_type"], "vicuna")
        if called == "Mistral" and int(language.get("vocab_size", 0)) >= _OPENCHAT:
            template = "openchat"
        return Reading(meant, names, towers, chat_template=template, fit=fit(config))

    @classmethod
    def write(cls, config: VlmixConfig) -> Writing:
        """One CLIP or SigLIP, its tokens as they are; no mixture, or one of DeepSpeed's in the decoder."""
        kind = str(config.language.model_type)
        names = [name for name, decoder in _DECODERS.items() if decoder == kind]
        if not names:
            known = ", ".join(_DECODERS.values())
            raise CheckpointError(f"a decoder of type {kind!r} has no class in MoE-LLaVA; known: {known}")
        mixtures = config.expert_settings()
        if len(mixtures) > 1:
            raise CheckpointError(f"MoE-LLaVA has one mixture of experts; this model has {len(mixtures)}")
        own, tower = _written_tower(config)
        first, last = ("MoELLaVA", names[-1]) if mixtures else ("Llava", names[-1])
        typed = f"{'moe_llava' if mixtures else 'llava'}_{last.lower()}"
        flat = flat_config(config, f"{first}{last}ForCausalLM", typed, {**own, "mm_video_tower": None})
        flat["image_projector_type"] = flat.pop("mm_projector_type")
        if kind == "stablelm":
            flat |= {theirs: flat.pop(ours) for theirs, ours in _STABLELM.items()}
        if mixtures:
            flat["moe"] = written_mixture(mixtures[0], int(config.language.num_hidden_layers))
        return Writing(flat, tower + _rest(flat, last))


def _called(folder: PublishedFolder) -> str:
    """The decoder's name in class names.

    Raises:
        CheckpointError: if transformers has nothing that computes the same.

    """
    words = {word.lower(): word for word in (*_DECODERS, _MINICPM)}
    if folder.decoder is not None:
        own = str(folder.decoder.get("model_type"))
        named = {kind: word for word, kind in _DECODERS.items()} | _OWN_TYPES
        called = named.get(own, own)
    elif found := _CLASS.search(architecture(folder)):
        called = found.group(1)
    else:
        own = str(folder.config.get("model_type", ""))
        called = words.get(own.partition("llava_")[2], own)
    if called == _MINICPM:
        raise CheckpointError(
            f"{folder.folder}: its decoder is MiniCPM, which transformers has no class of. The authors' code "
            "scales embeddings when it answers and not when it reads a picture, so no other class is equal"
        )
    if called not in _DECODERS:
        known = ", ".join(_DECODERS)
        raise CheckpointError(f"{folder.folder}: {called!r} is built on no decoder known here: {known}")
    return called


def _trunk(called: str) -> str:
    return _TRUNKS[called == _FIRST_QWEN]


def _language(folder: PublishedFolder, called: str) -> dict[str, Any]:
    config = folder.config if folder.decoder is None else folder.decoder
    if called == _FIRST_QWEN and any(name.startswith("transformer.h.") for name in folder.tensors):
        return qwen_config(config)
    found = language_config(folder, _DECODERS[called])
    renamed = _STABLELM if called == "Stablelm" else {}
    return {renamed.get(key, key): value for key, value in found.items() if not _NOT_LANGUAGE.match(key)}


def _sparse(folder: PublishedFolder) -> bool:
    return any(".deepspeed_moe." in name for name in folder.tensors)


def _tower(folder: PublishedFolder, trunk: str) -> tuple[dict[str, Any], Section]:
    """The encoder's settings, and where its tensors lie."""
    config = folder.config
    name, layer = str(config.get("mm_image_tower", "")), config.get("mm_vision_select_layer", -2)
    if (siglip := siglip_at(folder, trunk + _TOWER, name)) is not None:
        chosen = str(config.get("mm_vision_select_feature", "patch"))
        if chosen not in _SIGLIP_FEATURES:
            raise CheckpointError(f"mm_vision_select_feature {chosen!r} has no counterpart")
        settings = {
            **siglip_settings(siglip, name),
            "feature_layer": layer,
            "drop_first_patch": _SIGLIP_FEATURES[chosen],
        }
        names = siglip_names(siglip, _OURS, settings["layers"], clip_blocks(settings))
        return settings, (siglip.folder, names)
    clip, declared = clip_at(folder, trunk + _TOWER, name)
    settings = {
        **clip_settings(clip),
        "feature_layer": layer,
        "class_token": class_token(config),
        **declared,
    }
    return settings, (clip.folder, clip_names(clip, _OURS, settings["layers"], clip_blocks(settings)))


def _written_tower(config: VlmixConfig) -> tuple[dict[str, Any], Names]:
    """What the config says of the encoder, and where its tensors go."""
    kind = "siglip" if config.encoder_settings()[0].kind == "siglip" else "clip"
    (tower,) = parts_are(config, [kind], "single", "MoE-LLaVA")
    if kind == "siglip":
        check_settled({"encoders.0": (tower, {"final_norm": False})}, "MoE-LLaVA")
        known: dict[Any, str] = {dropped: name for name, dropped in _SIGLIP_FEATURES.items()}
        chosen, names = tower["drop_first_patch"], written_siglip(_TRUNKS[0] + _TOWER, _OURS)
    else:
        known = {kept: name for name, kept in FEATURES.items()}
        chosen, names = tower["class_token"], written_clip(_TRUNKS[0] + _TOWER, _OURS)
    if chosen not in known:
        raise CheckpointError("MoE-LLaVA keeps the class token through CLIP's blocks; this model does not")
    own = {
        "mm_vision_select_layer": clip_blocks(tower),
        "mm_vision_select_feature": known[chosen],
        "mm_image_tower": tower["weights"] or "",
    }
    return own, names


def _projector(config: Mapping[str, Any], trunk: str) -> tuple[dict[str, Any], Rename]:
    kind, rule = projector({"mm_projector_type": config.get("image_projector_type", "linear")})
    return kind, dataclasses.replace(rule, theirs=f"{trunk}{_PROJECTOR}{{rest}}")


def _rest(config: Mapping[str, Any], called: str) -> Names:
    own = Names((_projector(config, _trunk(called))[1],))
    if called == _FIRST_QWEN:
        return own + expert_names(QWEN_LAYER, QWEN_NETWORK) + QWEN
    return own + expert_names(_LAYER, _NETWORKS.get(called, Network())) + LANGUAGE
