"""Encoders of published checkpoints: where they lie, their sizes from tensor shapes, and their names."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmix.convert._names import Names, Rename, Unused
from vlmix.convert._source import PublishedFolder
from vlmix.core.errors import CheckpointError

CLIP = "model.vision_tower.vision_tower.vision_model."
HEAD_WIDTH = 64  # of every published CLIP; shapes do not show it
XXLARGE, XXLARGE_WIDTH = "xxlarge", 384
_TEXT = "the text side of CLIP"
_TEXT_SIDE = tuple(
    Unused(name, _TEXT)
    for name in ("text_model.{rest}", "text_projection.{rest}", "visual_projection.{rest}", "logit_scale")
)
_OPEN_CLIP_SIDE = tuple(
    Unused(name, _TEXT)
    for name in (
        "text.{rest}",
        "transformer.{rest}",
        "token_embedding.{rest}",
        "ln_final.{rest}",
        "positional_embedding",
        "text_projection",
        "logit_scale",
        "visual.head.{rest}",
    )
)
# A ConvNeXt in a folder of its own, by OpenCLIP or by timm: before its stem and stages.
_CONVNEXTS = ("visual.trunk.", "")

Section = tuple[PublishedFolder, Names]


@dataclass(frozen=True)
class Tower:
    """An encoder's tensors: in which folder, and what stands before their names."""

    folder: PublishedFolder
    prefix: str


@dataclass(frozen=True)
class ConvnextTower:
    """A ConvNeXt's tensors: in which folder, and what stands before those of stem, stages and classifier."""

    folder: PublishedFolder
    stem: str
    stages: str
    head: str = ""

    @classmethod
    def below(cls, folder: PublishedFolder, prefix: str) -> ConvnextTower:
        """As timm has it, all under one prefix."""
        return cls(folder, f"{prefix}stem.", f"{prefix}stages.", f"{prefix}head.")


def placed(folder: PublishedFolder, *sections: Section) -> tuple[Names, list[Section]]:
    """The rules for the checkpoint's own tensors, and those for encoders in folders of their own."""
    inside = Names()
    for part, names in sections:
        inside = inside + names if part is folder else inside
    return inside, [(part, names) for part, names in sections if part is not folder]


def clip_at(folder: PublishedFolder, prefix: str, name: str) -> tuple[Tower, dict[str, Any]]:
    """Where CLIP lies, inside under ``prefix`` or in its own folder, and what that folder's config says.

    Raises:
        CheckpointError: if it is at neither place.

    """
    beside = folder.tower(name)
    if any(key.startswith(prefix) for key in folder.tensors):
        return Tower(folder, prefix), _declared_clip(beside)
    found = _elsewhere(folder, beside, name, "CLIP")
    for outside in ("vision_model.", ""):
        if f"{outside}embeddings.patch_embedding.weight" in found.tensors:
            return Tower(found, outside), _declared_clip(found)
    raise CheckpointError(f"{found.folder}: holds no CLIP vision tower")


def convnext_at(inside: ConvnextTower, name: str) -> ConvnextTower:
    """Where a ConvNeXt lies: ``inside``, or in its own folder, as OpenCLIP or timm store it.

    Raises:
        CheckpointError: if it is at neither place.

    """
    beside = inside.folder.tower(name)
    if any(key.startswith(inside.stages) for key in inside.folder.tensors):
        return inside
    found = _elsewhere(inside.folder, beside, name, "ConvNeXt")
    for prefix in _CONVNEXTS:
        if f"{prefix}stem.0.weight" in found.tensors:
            return ConvnextTower.below(found, prefix)
    raise CheckpointError(f"{found.folder}: holds no ConvNeXt")


def _elsewhere(
    folder: PublishedFolder, beside: PublishedFolder | None, name: str, what: str
) -> PublishedFolder:
    if beside is None:
        raise CheckpointError(
            f"{folder.folder}: its {what} tower {name!r} is neither inside nor in a folder of that name "
            f"beside it. Say where it is with --tower {name or 'NAME'}=DIR"
        )
    return beside


def clip_settings(tower: Tower) -> dict[str, Any]:
    """A CLIP tower's sizes, from the shapes of its tensors."""
    folder, prefix = tower.folder, tower.prefix
    patch = shape_of(folder, f"{prefix}embeddings.patch_embedding.weight")
    positions = shape_of(folder, f"{prefix}embeddings.position_embedding.weight")[0] - 1
    side = math.isqrt(positions)
    if side * side != positions:
        raise CheckpointError(f"{folder.folder}: {positions} positions of CLIP fill no square")
    return {
        "kind": "clip",
        "image_size": side * patch[-1],
        "patch_size": patch[-1],
        "width": patch[0],
        "layers": count(folder, f"{prefix}encoder.layers."),
        "heads": max(patch[0] // HEAD_WIDTH, 1),
        "mlp": shape_of(folder, f"{prefix}encoder.layers.0.mlp.fc1.weight")[0],
    }


def _declared_clip(tower: PublishedFolder | None) -> dict[str, Any]:
    """What shapes do not show, heads and activation, where the tower's own config is at hand."""
    config = {} if tower is None else tower.config.get("vision_config", tower.config)
    names = (("heads", "num_attention_heads"), ("activation", "hidden_act"))
    return {ours: config[theirs] for ours, theirs in names if theirs in config}


def clip_names(tower: Tower, ours: str, layers: int, blocks: int) -> Names:
    """A CLIP tower's names, read at block ``blocks`` of ``layers``."""
    return written_clip(tower.prefix, ours) + Names(
        unused=(*clip_unused(tower.prefix, layers, blocks), *_TEXT_SIDE)
    )


def written_clip(prefix: str, ours: str) -> Names:
    """The same for a checkpoint that is to be written."""
    return Names((Rename(f"{prefix}{{rest}}", f"{ours}{{rest}}"),))


def clip_unused(prefix: str, layers: int, blocks: int) -> tuple[Unused, ...]:
    """What a tower read at block ``blocks`` of ``layers`` leaves unread."""
    behind = [
        Unused(f"{prefix}encoder.layers.{index}.{{rest}}", "behind the layer that is read")
        for index in range(blocks, layers)
    ]
    return (
        *behind,
        Unused(f"{prefix}post_layernorm.{{rest}}", "only the pooled class token passes through it"),
        Unused(f"{prefix}embeddings.position_ids", "computed from the config"),
    )


def clip_blocks(clip: dict[str, Any]) -> int:
    """How many blocks run before the layer that is read.

    As a layer's number it means the same in a folder that lacks the blocks behind it.
    """
    layer = int(clip["feature_layer"])
    return layer if layer >= 0 else int(clip["layers"]) + 1 + layer


def convnext_settings(tower: ConvnextTower, name: str = "") -> dict[str, Any]:
    """A ConvNeXt's sizes, from the shapes of its tensors; ``name`` is what the config calls it."""
    folder, stem, stages = tower.folder, tower.stem, tower.stages
    block = re.compile(re.escape(stages) + r"(\d)\.blocks\.(\d+)\.conv_dw\.weight")
    found = [(match, name) for name in folder.tensors if (match := block.fullmatch(name))]
    widths = {int(match[1]): folder.tensors[name].shape[0] for match, name in found}
    depths = [sum(int(match[1]) == stage for match, _ in found) for stage in range(4)]
    if sorted(widths) != [0, 1, 2, 3] or shape_of(folder, f"{stem}0.weight")[0] != widths[0]:
        raise CheckpointError(f"{folder.folder}: its ConvNeXt has not the four stages of one")
    return {
        "kind": "convnext",
        "depths": depths,
        "widths": [widths[stage] for stage in range(4)],
        # timm builds the xxlarge, which is 384 wide, with another constant than all smaller ones.
        "norm_eps": 1e-5 if XXLARGE in Path(name).name or widths[0] == XXLARGE_WIDTH else 1e-6,
    }


def convnext_names(tower: ConvnextTower, ours: str) -> Names:
    """A timm ConvNeXt's names; transformers of the time stored scales as ``weight``, not ``gamma``."""
    scales = "weight" if f"{tower.stages}0.blocks.0.weight" in tower.folder.tensors else "gamma"
    return written_convnext(tower.stem, tower.stages, tower.head, ours, scales)


def written_convnext(stem: str, stages: str, head: str, ours: str, scales: str = "weight") -> Names:
    """The same for a checkpoint that is to be written."""
    block = "{n}.blocks.{m}."
    classifier = (Unused(f"{head}{{rest}}", "the classifier, which no feature passes through"),)
    return Names(
        (
            Rename(f"{stages}{block}{scales}", f"{ours}stages.{block}gamma"),
            Rename(f"{stages}{{rest}}", f"{ours}stages.{{rest}}"),
            Rename(f"{stem}{{rest}}", f"{ours}stem.{{rest}}"),
        ),
        (*(classifier if head else ()), *_OPEN_CLIP_SIDE),
    )


def shape_of(folder: PublishedFolder, name: str) -> tuple[int, ...]:
    """The shape of a tensor that must be there."""
    if name not in folder.tensors:
        raise CheckpointError(f"{folder.folder}: {name} is missing")
    return folder.tensors[name].shape


def count(folder: PublishedFolder, prefix: str) -> int:
    """How many different numbers follow ``prefix``."""
    number = re.compile(re.escape(prefix) + r"(\d+)\.")
    return len({found.group(1) for name in folder.tensors if (found := number.match(name))})
