"""A SigLIP tower of a published checkpoint: its sizes from tensor shapes, and its names."""

from __future__ import annotations

import math
from typing import Any

from vlmix.convert._names import Names, Rename, Unused
from vlmix.convert._source import PublishedFolder
from vlmix.convert._towers import Tower, count, shape_of
from vlmix.core.errors import CheckpointError

HEAD_WIDTH = 72  # of SigLIP so400m; shapes do not show it
_OUTSIDE = ("vision_model.", "")
_TABLE = "embeddings.position_embedding.weight"


def siglip_at(folder: PublishedFolder, prefix: str, name: str) -> Tower | None:
    """Where a SigLIP lies, inside under ``prefix`` or in its own folder, if the tower is one."""
    beside = folder.tower(name)
    places = [Tower(folder, prefix)]
    places += [Tower(beside, outside) for outside in _OUTSIDE if beside is not None]
    found = [tower for tower in places if f"{tower.prefix}{_TABLE}" in tower.folder.tensors]
    # The class token is CLIP's.
    if not found or f"{found[0].prefix}embeddings.class_embedding" in found[0].folder.tensors:
        return None
    return found[0]


def siglip_settings(tower: Tower, name: str) -> dict[str, Any]:
    """A SigLIP's sizes; its folder, called ``name``, adds what shapes do not show: heads, and the margin."""
    folder, prefix = tower.folder, tower.prefix
    inside = prefix not in _OUTSIDE
    patch = shape_of(folder, f"{prefix}embeddings.patch_embedding.weight")
    cells = shape_of(folder, f"{prefix}{_TABLE}")[0]
    side = math.isqrt(cells)
    if side * side != cells:
        raise CheckpointError(f"{folder.folder}: {cells} positions of SigLIP fill no square")
    beside = folder if not inside else folder.tower(name)
    declared = {} if beside is None else beside.config.get("vision_config", beside.config)
    return {
        "kind": "siglip",
        "image_size": int(declared.get("image_size", side * patch[-1])),
        "patch_size": patch[-1],
        "width": patch[0],
        "layers": count(folder, f"{prefix}encoder.layers."),
        "heads": int(declared.get("num_attention_heads", max(patch[0] // HEAD_WIDTH, 1))),
        "mlp": shape_of(folder, f"{prefix}encoder.layers.0.mlp.fc1.weight")[0],
        "final_norm": False,
    }


def siglip_names(tower: Tower, ours: str, layers: int, blocks: int) -> Names:
    """Its names, read at block ``blocks`` of ``layers`` and before the last norm."""
    prefix = tower.prefix
    behind = [
        Unused(f"{prefix}encoder.layers.{index}.{{rest}}", "behind the layer that is read")
        for index in range(blocks, layers)
    ]
    return written_siglip(prefix, ours) + Names(
        unused=(
            *behind,
            Unused(f"{prefix}post_layernorm.{{rest}}", "behind the layer that is read"),
            Unused(f"{prefix}head.{{rest}}", "pools a picture into one vector, which no decoder reads"),
            Unused(f"{prefix}embeddings.position_ids", "computed from the config"),
            Unused("text_model.{rest}", "the text side of SigLIP"),
            Unused("logit_{rest}", "the text side of SigLIP"),
        )
    )


def written_siglip(prefix: str, ours: str) -> Names:
    """The same for a checkpoint that is to be written."""
    return Names((Rename(f"{prefix}{{rest}}", f"{ours}{{rest}}"),))
