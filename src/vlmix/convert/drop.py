"""``vlmix convert --drop-encoder N``: a model without one of its encoders, exact to the last column.

Where the channels of all encoders stand side by side, the projector's first layer adds up what each of them
contributes through columns of its own. Without an encoder its columns go: the result is the model that sees
nothing but zeros there.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from vlmix.convert._own import KEPT, SCHEMA, own_model
from vlmix.convert._shards import ShardWriter
from vlmix.convert._source import PublishedFolder
from vlmix.core.errors import CheckpointError
from vlmix.core.files import MANIFEST, publish, read_json, sha256, write_json, write_manifest
from vlmix.core.progress import Told, quiet
from vlmix.models.configuration import VlmixConfig

_FIRST = {"mlp": "model.projector.layers.0.weight", "linear": "model.projector.linear.weight"}
_NUMBERED = re.compile(r"(model\.encoders|model\.fusion\.norms)\.(\d+)\.(.*)")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def drop_encoder(source: Path, target: Path, index: int, told: Told = quiet) -> int:
    """Write the vlmix model in ``source`` to ``target`` without encoder ``index``; returns its channels.

    Its settings, weights and norm go, and its columns of the projector's first layer; all else stays as it
    is. Where its map gave the grid, the grid is written down.

    Raises:
        CheckpointError: if the model's parts do not allow that, or there is no such encoder.
        DiskFullError: if there is no room.

    """
    if target.exists():
        raise CheckpointError(f"{target} exists already; choose another folder")
    folder = own_model(source)
    config = VlmixConfig.from_pretrained(folder)
    _check(config, index)
    columns = _columns(config, index)
    with TemporaryDirectory() as scratch, publish(target) as new:
        _write_weights(new, PublishedFolder(folder, Path(scratch)), config, index, told)
        write_json(new / "config.json", _without(config, read_json(folder / "config.json"), index))
        for path in _others(folder):
            copy = shutil.copytree if path.is_dir() else shutil.copyfile
            copy(path, new / path.name)
        parent = sha256(folder / MANIFEST) if (folder / MANIFEST).is_file() else ""
        write_manifest(new, SCHEMA, parent=parent)
    return columns.stop - columns.start


def _check(config: VlmixConfig, index: int) -> None:
    kinds = [part.kind for part in config.encoder_settings()]
    fusion, projector = config.fusion_settings().kind, config.projector_settings().kind
    if fusion != "channel_concat" or projector not in _FIRST:
        raise CheckpointError(
            "an encoder can be cut out where channel_concat meets a projector of kind "
            f"{' or '.join(_FIRST)}; this model has {fusion} and {projector}"
        )
    if any(mixture.place == "projector" for mixture in config.expert_settings()):
        raise CheckpointError(
            "the projector holds experts, each of which reads all encoders: none can be cut out"
        )
    if config.adapters:
        raise CheckpointError("the model holds low-rank adapters; merge them first, with --merge-adapters")
    if not 0 <= index < len(kinds):
        listed = ", ".join(f"{number} {kind}" for number, kind in enumerate(kinds))
        raise CheckpointError(f"--drop-encoder {index}: there is no such encoder; the model has {listed}")
    if len(kinds) == 1:
        raise CheckpointError(f"--drop-encoder {index}: {kinds[0]} is the model's only encoder")


def _columns(config: VlmixConfig, index: int) -> slice:
    """The encoder's channels among all."""
    channels = [spec.channels for spec in config.plan().encoders]
    return slice(sum(channels[:index]), sum(channels[: index + 1]))


def _without(config: VlmixConfig, raw: dict[str, Any], index: int) -> dict[str, Any]:
    fusion = config.fusion_settings().model_dump(mode="json")
    if fusion["grid"] is None and index == 0:
        fusion["grid"] = list(config.plan().fused.grid)
    kept = [part for number, part in enumerate(config.encoders or []) if number != index]
    return {**raw, "encoders": kept, "fusion": fusion, "experts": _mixtures(config, index) or None}


def _mixtures(config: VlmixConfig, index: int) -> list[dict[str, Any]]:
    """Mixtures of what stays; those in encoders behind the one that goes move up with them."""
    places = {f"encoders.{n}": f"encoders.{n - (n > index)}" for n in range(len(config.encoders or []))}
    return [
        mixture.model_copy(update={"place": places.get(mixture.place, mixture.place)}).model_dump(mode="json")
        for mixture in config.expert_settings()
        if mixture.place != f"encoders.{index}"
    ]


def _write_weights(new: Path, folder: PublishedFolder, config: VlmixConfig, index: int, told: Told) -> None:
    first, columns = _FIRST[config.projector_settings().kind], _columns(config, index)
    named = list(_named(folder, index))
    done, total = 0, sum(folder.tensors[name].size for name, _ in named)
    writer = ShardWriter(new)
    for name, ours in named:
        writer.make_room(folder.tensors[name].size)
        tensor = folder.tensor(name)
        if name == first:
            tensor = torch.cat((tensor[:, : columns.start], tensor[:, columns.stop :]), dim=1)
        writer.add(ours, tensor)
        done += folder.tensors[name].size
        told("writing", done, total)
    writer.close()


def _named(folder: PublishedFolder, index: int) -> Iterator[tuple[str, str]]:
    """What stays, with the name it gets: encoders behind the one that goes move up."""
    for name in folder.tensors:
        found = _NUMBERED.fullmatch(name)
        if found is None:
            yield name, name
        elif (number := int(found[2])) != index:
            yield name, f"{found[1]}.{number - (number > index)}.{found[3]}"


def _others(folder: Path) -> list[Path]:
    """Tokenizer, processor and the like; no longer the way back to where the model came from."""
    weights = {path for pattern in _WEIGHTS for path in folder.glob(pattern)}
    names = {"config.json", MANIFEST, KEPT}
    return [path for path in folder.iterdir() if path not in weights and path.name not in names]
