"""Telling vlmix model folders from published ones."""

from __future__ import annotations

from pathlib import Path

from vlmix.core.errors import CheckpointError, InputError
from vlmix.core.files import MANIFEST, read_json, verify_manifest
from vlmix.models.loading import model_folder

SCHEMA = "vlmix.model/1"
KEPT = "published"  # what the way back needs lies there


def own_model(path: Path) -> Path:
    """The vlmix model folder that ``path`` is or holds, unchanged since it was written.

    Raises:
        CheckpointError: if it is none.

    """
    folder = model_folder(path)
    if not is_own(folder):
        raise CheckpointError(
            f"{folder}: is no vlmix model. Make it one first: vlmix convert {path} MODEL, without --to and "
            "--drop-encoder"
        )
    if (folder / MANIFEST).is_file():
        verify_manifest(folder)
    return folder


def is_own(path: Path) -> bool:
    """Whether ``path`` is, or holds, a vlmix model folder."""
    for config in (path / "config.json", path / "model" / "config.json"):
        try:
            found = read_json(config)
        except InputError:
            continue
        if isinstance(found, dict) and found.get("model_type") == "vlmix":
            return True
    return False
