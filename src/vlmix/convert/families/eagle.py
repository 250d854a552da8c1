"""Eagle (arXiv:2408.15998): up to five encoders, joined channel by channel."""

from __future__ import annotations

import math
import re
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
    projector,
    visual_scale,
    written_class,
)
from vlmix.convert._names import Names, Rename, Unused
from vlmix.convert._source import PublishedFolder
from vlmix.convert._towers import (
    HEAD_WIDTH,
    ConvnextTower,
    Section,
    clip_at,
    clip_names,
    clip_settings,
    convnext_at,
    convnext_names,
    convnext_settings,
    count,
    placed,
    shape_of,
    written_clip,
    written_convnext,
)
from vlmix.convert.registry import FAMILIES
from vlmix.core.errors import CheckpointError
from vlmix.encoders._pixels import CLIP_MEAN, CLIP_STD
from vlmix.encoders.eva02 import DETECTOR_NAMES
from vlmix.models.configuration import VlmixConfig

_TOWERS = re.compile(r"model\.vision_tower\.vision_towers\.(\d+)\.vision_tower\.")
_SIZE, _GRID, _CLIP_SIZE, _PATCHES = 1024, 32, 336, 2048
_EVA_WINDOW, _EVA_SIGN = 16, "blocks.0.attn.q_bias"
# Every tower is given the one tensor that CLIP's statistics normalised.
_CLIP_LOOK = {"mean": CLIP_MEAN, "std": CLIP_STD, "resize": "bilinear_corners"}
_CALLED = {
    "clip": "clip-448",
    "convnext": "convnext-1024",
    "sam": "sam-1024",
    "eva02": "det-1024",
    "pix2struct": "pix2struct-1024",
}
# What its code has no choice about, by kind. The loss of encoders in training leaves no trace in a model.
_SETTLED: dict[str, dict[str, Any]] = {
    "clip": {"class_token": "drop_before", "feature_layer": -1, "resize": "bilinear_corners"},
    "convnext": {"stages": [3]},
    "sam": {"neck": "first", "mean": [*CLIP_MEAN], "std": [*CLIP_STD]},
    "eva02": {"mean": [*CLIP_MEAN], "std": [*CLIP_STD]},
    "pix2struct": {},
}
_FUSION = {"norm": False, "resampling": "bilinear_corners"}


@FAMILIES.register("eagle")
class Eagle(Family):
    """Folders written by Eagle's own classes, of either stage."""

    @classmethod
    def recognises(cls, folder: PublishedFolder) -> bool:
        """A list of towers, or a first stage's projector whose config lists several."""
        listed = ";" in str(folder.config.get("mm_vision_tower", ""))
        return any(_TOWERS.match(name) for name in folder.tensors) or (
            listed and any(name.startswith("model.mm_projector.") for name in folder.tensors)
        )

    @classmethod
    def read(cls, folder: PublishedFolder) -> Reading:
        """Each tower is told by its tensors; CLIP runs at 336 pixels although Eagle calls it 448."""
        language = language_config(folder)
        towers = [_tower(folder, index, name) for index, name in _listed(folder).items()]
        meant = {
            "text_config": language,
            "encoders": [settings for settings, _ in towers],
            "fusion": {
                "kind": "channel_concat",
                "grid": [_GRID, _GRID],
                "resampling": "bilinear_corners",
            },
            "projector": {**projector(folder.config)[0], **visual_scale(language)},
            "image_size": _SIZE,
        }
        rest = Names((projector(folder.config)[1],)) + LANGUAGE
        names, elsewhere = placed(folder, *(section for _, section in towers), (folder, rest))
        template = chat_template(language, TEMPLATES, llama3="llama3")
        return Reading(meant, names, elsewhere, chat_template=template, fit=fit(folder.config))

    @classmethod
    def write(cls, config: VlmixConfig) -> Writing:
        """Any of Eagle's five towers, joined channel by channel on one grid."""
        encoders = [part.model_dump(mode="json") for part in config.encoder_settings()]
        foreign = [part["kind"] for part in encoders if part["kind"] not in _CALLED]
        if foreign or config.fusion_settings().kind != "channel_concat":
            raise CheckpointError(
                f"Eagle joins {', '.join(_CALLED)} with channel_concat; this model has "
                f"{[part['kind'] for part in encoders]} with {config.fusion_settings().kind}"
            )
        settled = {f"encoders.{i}": (part, _SETTLED[part["kind"]]) for i, part in enumerate(encoders)}
        fusion = config.fusion_settings().model_dump(mode="json")
        check_settled({**settled, "fusion": (fusion, _FUSION)}, "Eagle")
        if config.view_settings().kind != "whole":
            raise CheckpointError("Eagle shows its encoders the whole picture; this model cuts it")
        names = Names()
        for index, settings in enumerate(encoders):
            names = names + _written(settings["kind"], _prefix(index), f"model.encoders.{index}.tower.")
        own = {
            "mm_vision_tower": ";".join(_CALLED[part["kind"]] for part in encoders),
            "mm_vision_select_layer": -2,
            "mm_patch_merge_type": "flat",
            "tokenizer_padding_side": "right",
        }
        flat = flat_config(config, written_class(config, "Eagle{}ForCausalLM"), "eagle_llama", own)
        return Writing(flat, names + Names((projector(flat)[1],)) + LANGUAGE)


def _prefix(index: int) -> str:
    return f"model.vision_tower.vision_towers.{index}.vision_tower."


def _listed(folder: PublishedFolder) -> dict[int, str]:
    """The towers by number, with the names that the config has for them."""
    names = dict(enumerate(str(folder.config.get("mm_vision_tower", "")).split(";")))
    inside = {int(found.group(1)) for name in folder.tensors if (found := _TOWERS.match(name))}
    return {index: names.get(index, "") for index in sorted(inside or names)}


def _tower(folder: PublishedFolder, index: int, name: str) -> tuple[dict[str, Any], Section]:
    """One tower's settings, and its names."""
    prefix, ours = _prefix(index), f"model.encoders.{index}.tower."
    outside = not any(key.startswith(prefix) for key in folder.tensors)
    if f"{prefix}vision_model.embeddings.class_embedding" in folder.tensors or (
        outside and name.startswith("clip")
    ):
        tower, declared = clip_at(folder, f"{prefix}vision_model.", name)
        clip = clip_settings(tower)
        clip |= {
            "table_size": clip["image_size"],
            "image_size": _CLIP_SIZE,
            "feature_layer": -1,
            "class_token": "drop_before",
            "resize": "bilinear_corners",
            **declared,
        }
        return clip, (tower.folder, clip_names(tower, ours, clip["layers"], clip["layers"]))
    if f"{prefix}stem.0.weight" in folder.tensors or (outside and name.startswith("convnext")):
        convnext = convnext_at(ConvnextTower.below(folder, prefix), name)
        settings = {**convnext_settings(convnext), "image_size": _SIZE, "stages": [3], "norm_eps": 1e-5}
        return settings, (convnext.folder, convnext_names(convnext, ours))
    if outside:
        raise CheckpointError(
            f"{folder.folder}: its tower {name!r} is not inside. Only clip and convnext are read from "
            "folders of their own: the others are not stored so, and SAM's neck only with the whole model"
        )
    return _other(folder, prefix, index), (folder, _names(folder, prefix, ours))


def _other(folder: PublishedFolder, prefix: str, index: int) -> dict[str, Any]:
    if f"{prefix}patch_embed.projection.weight" in folder.tensors:
        return _sam(folder, prefix)
    if f"{prefix}{_EVA_SIGN}" in folder.tensors:
        return _eva02(folder, prefix)
    if f"{prefix}embeddings.row_embedder.weight" in folder.tensors:
        return _pix2struct(folder, prefix)
    some = next(name for name in folder.tensors if name.startswith(prefix))
    raise CheckpointError(f"{folder.folder}: tower {index} (with {some}) is of a kind not known here")


def _sam(folder: PublishedFolder, prefix: str) -> dict[str, Any]:
    """Position biases tell which blocks are global, and a head's width."""
    biases = [
        shape_of(folder, f"{prefix}layers.{i}.attn.rel_pos_h")
        for i in range(count(folder, f"{prefix}layers."))
    ]
    width, _, _, patch = shape_of(folder, f"{prefix}patch_embed.projection.weight")
    side = shape_of(folder, f"{prefix}pos_embed")[1]
    wide = [index for index, bias in enumerate(biases) if bias[0] == 2 * side - 1]
    narrow = {(bias[0] + 1) // 2 for index, bias in enumerate(biases) if index not in wide}
    return {
        "kind": "sam",
        "image_size": side * patch,
        "patch_size": patch,
        "width": width,
        "layers": len(biases),
        "heads": width // biases[0][1],
        "mlp": shape_of(folder, f"{prefix}layers.0.mlp.lin1.weight")[0],
        "window": narrow.pop() if narrow else 0,
        "global_blocks": wide,
        "neck": "first",
        "neck_channels": shape_of(folder, f"{prefix}neck.conv1.weight")[0],
        "resample": {"grid": [side // 2, side // 2], "mode": "channel_major"},
        **_CLIP_LOOK,
    }


def _eva02(folder: PublishedFolder, prefix: str) -> dict[str, Any]:
    """The rotations' buffers tell windows, grid, a head's width and which blocks are global.

    A folder written here has none of these buffers, which are computed: then sizes are the published ones and
    every third block is global.
    """
    width, _, _, patch = shape_of(folder, f"{prefix}patch_embed.proj.weight")
    cells, head, window = (_SIZE // patch) ** 2, min(HEAD_WIDTH, width), _EVA_WINDOW
    if f"{prefix}rope_glb.freqs_cos" in folder.tensors:
        cells, head = shape_of(folder, f"{prefix}rope_glb.freqs_cos")
        window = math.isqrt(shape_of(folder, f"{prefix}rope_win.freqs_cos")[0])
    layers = count(folder, f"{prefix}blocks.")
    table = math.isqrt(shape_of(folder, f"{prefix}pos_embed")[1] - 1)
    return {
        "kind": "eva02",
        "image_size": math.isqrt(cells) * patch,
        "patch_size": patch,
        "width": width,
        "layers": layers,
        "heads": width // head,
        "mlp": shape_of(folder, f"{prefix}blocks.0.mlp.w1.weight")[0],
        "window": window,
        "global_blocks": _eva02_global(folder, prefix, layers, cells),
        "rope_grid": window,
        "table_size": table * patch,
        **_CLIP_LOOK,
    }


def _eva02_global(folder: PublishedFolder, prefix: str, layers: int, cells: int) -> list[int]:
    """The blocks whose rotations have a row for every cell, or every third where not all blocks tell."""
    names = [f"{prefix}blocks.{index}.attn.rope.freqs_cos" for index in range(layers)]
    if not all(name in folder.tensors for name in names):
        return list(range(2, layers, 3))
    return [index for index, name in enumerate(names) if shape_of(folder, name)[0] == cells]


def _pix2struct(folder: PublishedFolder, prefix: str) -> dict[str, Any]:
    """As many patches as half the positions, as published: 2048 of 4096."""
    positions, width = shape_of(folder, f"{prefix}embeddings.row_embedder.weight")
    inner = shape_of(folder, f"{prefix}encoder.layer.0.attention.query.weight")[0]
    inputs = shape_of(folder, f"{prefix}embeddings.patch_projection.weight")[1]
    return {
        "kind": "pix2struct",
        "image_size": _SIZE,
        "patch_size": math.isqrt(inputs // 3),
        "width": width,
        "layers": count(folder, f"{prefix}encoder.layer."),
        "heads": max(inner // HEAD_WIDTH, 1),
        "head_width": min(HEAD_WIDTH, inner),
        "mlp": shape_of(folder, f"{prefix}encoder.layer.0.mlp.wi_0.weight")[0],
        "patches": _PATCHES,
        "positions": positions,
        "resize": "bilinear_corners",
    }


def _names(folder: PublishedFolder, prefix: str, ours: str) -> Names:
    eva = f"{prefix}{_EVA_SIGN}" in folder.tensors
    unused = (
        Unused(f"{prefix}rope_{{rest}}", "computed from the config"),
        Unused(f"{prefix}blocks.{{n}}.attn.rope.{{rest}}", "computed from the config"),
    )
    return _written("eva02" if eva else "", prefix, ours) + Names(unused=unused if eva else ())


def _written(kind: str, prefix: str, ours: str) -> Names:
    if kind == "clip":
        return written_clip(f"{prefix}vision_model.", ours)
    if kind == "convnext":
        return written_convnext(f"{prefix}stem.", f"{prefix}stages.", "", ours)
    whole = Rename(f"{prefix}{{rest}}", f"{ours}{{rest}}")
    if kind != "eva02":
        return Names((whole,))
    inside = [_block_rule(prefix, ours, *pair) for pair in DETECTOR_NAMES]
    patches = Rename(f"{prefix}patch_embed.proj.{{rest}}", f"{ours}patch_embed.{{rest}}")
    return Names((*inside, patches, whole))


def _block_rule(prefix: str, ours: str, name: str, our_name: str) -> Rename:
    rest = "{rest}" if name.endswith(".") else ""
    return Rename(f"{prefix}blocks.{{n}}.{name}{rest}", f"{ours}blocks.{{n}}.{our_name}{rest}")
