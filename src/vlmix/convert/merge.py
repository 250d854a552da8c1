"""``vlmix convert --merge-adapters``: a model whose low-rank adapters have become part of its weights."""

from __future__ import annotations

from pathlib import Path

from vlmix.convert._own import SCHEMA, own_model
from vlmix.core.errors import CheckpointError
from vlmix.core.files import MANIFEST, publish, sha256, write_manifest
from vlmix.models.adapters import merge_adapters
from vlmix.models.loading import load


def merge(source: Path, target: Path) -> int:
    """Write the vlmix model in ``source`` to ``target`` without adapters; returns how many Linears had some.

    Its outputs stay as they were up to rounding.

    Raises:
        CheckpointError: if it is no vlmix model, or has no adapters.
        DiskFullError: if there is no room.

    """
    if target.exists():
        raise CheckpointError(f"{target} exists already; choose another folder")
    folder = own_model(source)
    model, processor = load(folder, device="cpu")
    merged = merge_adapters(model)
    if not merged:
        raise CheckpointError(f"{folder}: the model has no adapters to merge")
    with publish(target) as new:
        model.save_pretrained(new)
        processor.save_pretrained(new)
        parent = sha256(folder / MANIFEST) if (folder / MANIFEST).is_file() else ""
        write_manifest(new, SCHEMA, parent=parent)
    return merged
