"""Facts that everything descended from LLaVA shares: decoder, projector, flat config, and their names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vlmix.convert._names import Names, Rename, Stack, Unused
from vlmix.convert._source import PublishedFolder
from vlmix.core.errors import CheckpointError
from vlmix.models.configuration import VlmixConfig
from vlmix.models.image_processing import Fit

# What stands in class names, and the decoder behind it; the last of a kind is what is written.
_LANGUAGES = {
    "Llama": "llama",
    "Mistral": "mistral",
    "Mixtral": "mixtral",
    "Gemma": "gemma",
    "Qwen": "qwen2",
    "Qwen2": "qwen2",
    "Phi": "phi",
}
_CLASS = re.compile(f"({'|'.join(_LANGUAGES)})ForCausalLM")
_LLAMA_TYPES = ("llava", "mgm", "mini_gemini")  # those of other decoders end with its name
_FOREIGN = re.compile(
    r"mm_|tune_|freeze_|use_mm_|unfreeze_|image_|optimize_|tokenizer_|aux_|vision_|is_multipath|input_image"
    r"|num_query_group|query_num_list|connector_|(num|start|stride)_of_vision"
)
_NOT_LANGUAGE = frozenset(
    (
        "architectures",
        "model_type",
        "transformers_version",
        "torch_dtype",
        "auto_map",
        "_name_or_path",
        "dtype",
    )
)

FEATURES = {"patch": "drop_after", "cls_patch": "keep"}
_ROPE = ("rope_theta", "partial_rotary_factor")  # once keys of their own
_LAYER, _OUR_LAYER = "model.layers.{n}.", "model.language_model.model.layers.{n}."
_EXPERT = f"{_LAYER}block_sparse_moe.experts.{{e}}."

LANGUAGE = Names(
    (
        # Mixtral as it lies on the hub; transformers 5 holds all experts of a layer in two tensors.
        Stack((f"{_EXPERT}w1.weight", f"{_EXPERT}w3.weight"), f"{_OUR_LAYER}mlp.experts.gate_up_proj"),
        Stack((f"{_EXPERT}w2.weight",), f"{_OUR_LAYER}mlp.experts.down_proj"),
        Rename(f"{_LAYER}block_sparse_moe.gate.{{rest}}", f"{_OUR_LAYER}mlp.gate.{{rest}}"),
        Rename("lm_head.{rest}", "model.language_model.lm_head.{rest}"),
        Rename("model.{rest}", "model.language_model.model.{rest}"),
    ),
    (Unused(f"{_LAYER}self_attn.rotary_emb.inv_freq", "computed from the config"),),
)
# Templates by decoder; one of Llama's make is told further by its vocabulary.
TEMPLATES = {"mistral": "mistral", "mixtral": "mistral", "gemma": "gemma", "qwen2": "chatml", "phi": "phi"}
_LLAMA3, _YI = 128256, 64000
_ADDED = 512  # tokens that checkpoints have put behind a decoder's own vocabulary, at most


def architecture(folder: PublishedFolder) -> str:
    """The class that wrote the checkpoint, or nothing."""
    found = folder.config.get("architectures")
    return str(found[0]) if isinstance(found, list) and found else ""


def language_config(folder: PublishedFolder, kind: str = "") -> dict[str, Any]:
    """The decoder's own part of a flat ``config.json``, or its own config where its folder is another.

    ``kind`` is the decoder's ``model_type``, where the family knows it.

    Raises:
        CheckpointError: if there is no decoder, or one that is not known here.

    """
    if not any(name.startswith("model.layers.") for name in folder.tensors):
        raise CheckpointError(
            f"{folder.folder}: holds what a first stage trained and no language model. Give the folder of "
            "the decoder it was trained on with --language-model DIR"
        )
    config = folder.config if folder.decoder is None else folder.decoder
    kind = kind or _decoder(folder, config)
    own = {
        key: value
        for key, value in config.items()
        if not _FOREIGN.match(key) and key not in _NOT_LANGUAGE and key != "hidden_activation"
    }
    # What the whole was trained with counts, not what a newer copy of the decoder says.
    activation = folder.config if "hidden_act" in folder.config else config
    return {**own, **(_gemma_activation(activation) if kind == "gemma" else {}), "model_type": kind}


def _decoder(folder: PublishedFolder, config: Mapping[str, Any]) -> str:
    if folder.decoder is not None:
        return str(config.get("model_type"))
    if (found := _CLASS.search(architecture(folder))) is not None:
        return _LANGUAGES[found.group(1)]
    kind = str(config.get("model_type", ""))
    named = "llama" if kind in _LLAMA_TYPES else kind.rpartition("_")[2]
    if architecture(folder) or named not in _LANGUAGES.values():
        raise CheckpointError(
            f"{folder.folder}: {architecture(folder) or kind!r} is built on no decoder known here: "
            f"{', '.join(_LANGUAGES)}"
        )
    return named


def _gemma_activation(config: Mapping[str, Any]) -> dict[str, Any]:
    """Which GELU a Gemma was trained with.

    Up to transformers 4.38 ``gelu`` in ``hidden_act`` was the exact one. Later versions take
    ``hidden_activation``, where nothing stands for tanh's approximation, and turn ``gelu`` into that too; so
    the exact one goes by its other name here.
    """
    if "hidden_activation" in config:
        found = config["hidden_activation"] or "gelu_pytorch_tanh"
    else:
        found = config.get("hidden_act", "gelu_pytorch_tanh")
    return {"hidden_act": "gelu_python" if found == "gelu" else found}


def chat_template(language: Mapping[str, Any], templates: Mapping[str, str], llama3: str) -> str:
    """The template a decoder was trained with here: Llama's are told by their vocabulary."""
    kind, vocabulary = str(language["model_type"]), int(language.get("vocab_size", 0))
    if kind == "llama":
        known = {_LLAMA3: llama3, _YI: "chatml"}
        return next((known[size] for size in known if 0 <= vocabulary - size <= _ADDED), "vicuna")
    return templates.get(kind, "vicuna")


def visual_scale(language: Mapping[str, Any]) -> dict[str, float]:
    """What visual tokens bring along for Gemma, which multiplied all it read by the root of its width.

    Transformers 5 does so where tokens are looked up, so that visual tokens no longer pass by.
    """
    return {"scale": float(language["hidden_size"]) ** 0.5} if language["model_type"] == "gemma" else {}


def fit(config: Mapping[str, Any]) -> Fit:
    """How pictures were made square: cut in the middle, as in first stages, unless the config says `pad`."""
    return "pad" if config.get("image_aspect_ratio") == "pad" else "crop"


def class_token(config: Mapping[str, Any], known: Sequence[str] = tuple(FEATURES)) -> str:
    """What becomes of CLIP's class token, from ``mm_vision_select_feature``.

    Raises:
        CheckpointError: if that is none of ``known``.

    """
    chosen = str(config.get("mm_vision_select_feature", "patch"))
    if chosen not in known:
        raise CheckpointError(f"mm_vision_select_feature {chosen!r} has no counterpart; {list(known)} has")
    return FEATURES[chosen]


def canvases(sizes: Iterable[Sequence[int]], side: int) -> list[list[int]]:
    """Canvases of whole tiles, from their (height, width) in pixels.

    Raises:
        CheckpointError: if one is no whole number of tiles.

    """
    found = [list(size) for size in sizes]
    if wrong := [size for size in found if any(length % side for length in size)]:
        raise CheckpointError(f"image_grid_pinpoints: {wrong[0]} is no whole number of tiles of {side}")
    return [[length // side for length in size] for size in found]


def projector(config: Mapping[str, Any]) -> tuple[dict[str, Any], Rename]:
    """The projector's settings and names, from ``mm_projector_type``.

    Raises:
        CheckpointError: if it is of another kind.

    """
    kind = str(config.get("mm_projector_type", "linear"))
    if kind == "identity":
        return {"kind": kind}, Rename("model.mm_projector.{rest}", "model.projector.{rest}")
    if kind == "linear":
        return {"kind": "linear"}, Rename("model.mm_projector.{rest}", "model.projector.linear.{rest}")
    found = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    if found is None:
        raise CheckpointError(f"mm_projector_type {kind!r} is not known; known: identity, linear, mlpNx_gelu")
    layers = Rename("model.mm_projector.{rest}", "model.projector.layers.{rest}")
    return {"kind": "mlp", "depth": int(found.group(1))}, layers


def flat_config(config: VlmixConfig, name: str, model_type: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """A config as LLaVA's descendants write it: the decoder's keys and their own side by side."""
    settings = config.projector_settings().model_dump()
    plain = settings.get("hidden") is None and settings.get("bias", True)
    if settings["kind"] not in ("identity", "linear", "mlp") or not plain:
        raise CheckpointError(f"the projector {settings} has no counterpart in this family")
    decoder = config.language.to_dict()
    scale = visual_scale(decoder).get("scale", 1.0)
    if not math.isclose(settings["scale"], scale, rel_tol=1e-6):
        raise CheckpointError(
            f"the projector's scale is {settings['scale']}; this family reads a {decoder['model_type']} "
            f"with {scale}"
        )
    kind = f"mlp{settings['depth']}x_gelu" if settings["kind"] == "mlp" else settings["kind"]
    return {
        **_flat_language(decoder),
        "architectures": [name],
        "model_type": model_type,
        "mm_projector_type": kind,
        "mm_hidden_size": config.plan().fused.channels,
        "use_mm_proj": True,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
        **own,
    }


def _flat_language(decoder: Mapping[str, Any]) -> dict[str, Any]:
    flat = {key: value for key, value in decoder.items() if key not in {*_NOT_LANGUAGE, "rope_parameters"}}
    rope = decoder.get("rope_parameters") or {}
    beside = {key: rope[key] for key in _ROPE if key in rope}
    if beside:
        scaling = {key: value for key, value in rope.items() if key not in _ROPE}
        plain = scaling.get("rope_type", "default") == "default"
        flat |= {**beside, "rope_scaling": None if plain else scaling}
    if decoder["model_type"] == "gemma":
        flat |= (
            {"hidden_act": "gelu"}
            if decoder["hidden_act"] == "gelu_python"
            else {"hidden_activation": decoder["hidden_act"]}
        )
    return flat


def written_class(config: VlmixConfig, pattern: str) -> str:
    """``pattern`` with the decoder's name in it, such as ``LlavaLlamaForCausalLM``.

    Raises:
        CheckpointError: if the family has no class for this decoder.

    """
    kind = str(config.language.model_type)
    names = [name for name, decoder in _LANGUAGES.items() if decoder == kind]
    if not names:
        known = ", ".join(dict.fromkeys(_LANGUAGES.values()))
        raise CheckpointError(f"a decoder of type {kind!r} has no class in this family; known: {known}")
    return pattern.format(names[-1])


def parts_are(
    config: VlmixConfig, encoders: Sequence[str], fusion: str, family: str, views: Sequence[str] = ("whole",)
) -> list[dict[str, Any]]:
    """The encoders' settings of a model that has just these parts.

    Raises:
        CheckpointError: if it has others.

    """
    if (kind := config.view_settings().kind) not in views:
        raise CheckpointError(f"{family} has views of kind {' or '.join(views)}; this model's are {kind}")
    settings = config.encoder_settings()
    found = ([part.kind for part in settings], config.fusion_settings().kind)
    if found != (list(encoders), fusion):
        raise CheckpointError(
            f"{family} is {list(encoders)} with {fusion}; this model is {found[0]} with {found[1]}"
        )
    return [part.model_dump(mode="json") for part in settings]


def check_settled(parts: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]], family: str) -> None:
    """Refuse settings that the authors' code has no choice about, so that nothing is lost in silence.

    ``parts`` are a model's parts by name: their settings, and what the authors' code has for them.

    Raises:
        CheckpointError: if one differs.

    """
    wrong = [
        f"{name}.{key} is {found[key]!r}, there always {value!r}"
        for name, (found, settled) in parts.items()
        for key, value in settled.items()
        if found[key] != value
    ]
    if wrong:
        raise CheckpointError(f"{family} has no place for some settings: {'; '.join(wrong)}")


def required(folder: PublishedFolder, key: str) -> Any:
    """What the config says under ``key``.

    Raises:
        CheckpointError: if it says nothing.

    """
    if key not in folder.config:
        raise CheckpointError(f"{folder.folder}: config.json has no {key!r}, which this family needs")
    return folder.config[key]
