"""An encoder of another vlmix model: found in its folder, compared, and read without building that model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vlmix.core.errors import CheckpointError
from vlmix.core.files import read_json, verify_manifest
from vlmix.core.settings import PartSettings
from vlmix.models.adapters import merged_tensors
from vlmix.models.configuration import VlmixConfig
from vlmix.models.loading import model_folder
from vlmix.train.checkpoint import CHECKPOINTS, SETUP, newest
from vlmix.train.parallel.pieces import Stored

# What an encoder is shown, and how it was trained, may differ; what its weights compute may not.
_FREE = frozenset(
    (
        "weights",
        "image_size",
        "table_size",
        "resize",
        "mean",
        "std",
        "resample",
        "sees",
        "drop_path",
        "layer_scale",
    )
)


def is_vlmix(path: Path) -> bool:
    """Whether ``path`` is a model or run folder of vlmix."""
    configs = [path / "config.json", path / "model" / "config.json", path / SETUP / "config.json"]
    found = [config for config in configs if config.is_file()]
    return bool(found) and read_json(found[0]).get("model_type") == "vlmix"


def read_encoder(
    path: Path, number: int, ours: PartSettings, wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of encoder ``number`` of the model in ``path``, by their names inside it.

    ``ours`` are the settings of the encoder they are for, and ``wanted`` its own tensors. A run that has not
    finished gives those of its newest checkpoint.

    Raises:
        CheckpointError: if ``path`` holds no vlmix model or no such encoder, or it is another than ``ours``.

    """
    weights, configured = _folders(path)
    config = VlmixConfig.from_pretrained(configured, local_files_only=True)
    settings = config.encoder_settings()
    if number >= len(settings):
        raise CheckpointError(f"{path}: no encoder {number}; it has {len(settings)}, counted from 0")
    _check_settings(path, number, settings[number].model_dump(), ours.model_dump())
    prefix = f"model.encoders.{number}."
    stored = merged_tensors(_read(weights, prefix), config.adapter_settings())
    found = {name.removeprefix(prefix): tensor for name, tensor in stored.items()}
    _check_shapes(path, number, found, wanted)
    return found


def _folders(path: Path) -> tuple[Path, Path]:
    """Where the weights are, and where their configuration."""
    if not is_vlmix(path):
        raise CheckpointError(
            f"{path} is no model or run folder of vlmix; without `from`, published weights are loaded"
        )
    if (path / SETUP).is_dir() and not (path / "model").is_dir():
        found = newest(path / CHECKPOINTS)
        if found is None:
            raise CheckpointError(f"{path}: this run has no checkpoint yet")
        return found.folder, path / SETUP
    folder = model_folder(path)
    if (folder / "manifest.json").is_file():
        verify_manifest(folder)
    return folder, folder


def _check_settings(
    path: Path, number: int, theirs: Mapping[str, object], ours: Mapping[str, object]
) -> None:
    keys = [key for key in {**ours, **theirs} if key not in _FREE]
    wrong = [
        f"{key} is {theirs.get(key)!r}, here {ours.get(key)!r}"
        for key in keys
        if theirs.get(key) != ours.get(key)
    ]
    if wrong:
        raise CheckpointError(f"{path}: encoder {number} is another: {'; '.join(wrong)}")


def _check_shapes(path: Path, number: int, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    wrong = [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
    wrong += [f"{name} has no place here" for name in sorted(found.keys() - wanted.keys())]
    wrong += [
        f"{name} is {tuple(found[name].shape)}, here {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if wrong:
        shown = "; ".join(wrong[:8]) + (" …" if len(wrong) > 8 else "")
        raise CheckpointError(f"{path}: encoder {number} does not fit: {shown}")


def _read(folder: Path, prefix: str) -> dict[str, Tensor]:
    """Every tensor whose name starts with ``prefix``, from one file or several."""
    stored = Stored(folder, "model")
    return {name: stored.read(name) for name in sorted(stored.names) if name.startswith(prefix)}
