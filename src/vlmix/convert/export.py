"""``vlmix convert --to FAMILY``: a vlmix model folder in the layout the authors' own code reads."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from vlmix.convert._family import Writing
from vlmix.convert._names import Cut, Names, Piece, Rename, Rule, Stack
from vlmix.convert._own import KEPT, own_model
from vlmix.convert._prompt import written_prompts
from vlmix.convert._shards import ShardWriter
from vlmix.convert._source import PublishedFolder
from vlmix.convert.registry import FAMILIES
from vlmix.convert.run import READING
from vlmix.core.errors import CheckpointError
from vlmix.core.files import publish, read_json, write_json
from vlmix.core.progress import Told, quiet
from vlmix.models.configuration import VlmixConfig

_GENERATION = "generation_config.json"
# By their names: which of our tensors, or which part of one, and bytes.
_Taken = Mapping[str, tuple[list[tuple[str, Piece]], int]]
_BESIDE = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    _GENERATION,
)


def export(source: Path, target: Path, family: str, told: Told = quiet) -> int:
    """Write the model in ``source`` to ``target`` as ``family`` stores it; returns the number of tensors.

    A folder that was converted from this family gives back the very config and tensors it came from, those
    without a place here included.

    Raises:
        UnknownNameError: if there is no such family.
        CheckpointError: if the model is not one of the family, or a tensor has no place in it.
        DiskFullError: if there is no room.

    """
    if target.exists():
        raise CheckpointError(f"{target} exists already; choose another folder")
    folder = own_model(source)
    with TemporaryDirectory() as scratch:
        ours = PublishedFolder(folder, Path(scratch))
        way = _way(folder, family)
        taken = _taken(ours, way, family)
        aside = _aside(ours, Path(scratch))
        done, total = 0, sum(size for _, size in taken.values())
        with publish(target) as new:
            writer = ShardWriter(new)
            for theirs, (parts, size) in taken.items():
                writer.make_room(size)
                tensors = [ours.tensor(name, piece.box) for name, piece in parts]
                writer.add(theirs, tensors[0] if len(tensors) == 1 else torch.cat(tensors))
                done += size
                told("writing", done, total)
            for part, name in aside:
                writer.make_room(part.tensors[name].size)
                writer.add(name, part.tensor(name))
            writer.close(index=FAMILIES.get(family).indexed)
            _write_beside(new, folder, way)
    return len(taken) + len(aside)


@dataclass(frozen=True)
class _Way:
    """How a model is written: ``elsewhere`` are names of encoders that stay in folders of their own.

    ``tied`` are tensors that were stored twice, with our name of the other.
    """

    writing: Writing
    elsewhere: Names = field(default_factory=Names)
    tied: Mapping[str, str] = field(default_factory=dict)
    generation: Mapping[str, Any] | None = None


def _way(folder: Path, family: str) -> _Way:
    """As it was read where it came from this family, else as the family writes a model of its kind."""
    cls, path = FAMILIES.get(family), folder / KEPT / READING
    kept: Mapping[str, Any] = read_json(path) if path.is_file() else {"family": ""}
    if kept["family"] == family and kept["whole"]:
        names, elsewhere = (_names(kept[key]) for key in ("renames", "elsewhere"))
        return _Way(Writing(kept["config"], names), elsewhere, kept["tied"], kept["generation_config"])
    writing = cls.write(VlmixConfig.from_pretrained(folder))
    writing = Writing(written_prompts(writing.config, folder), writing.names)
    if kept["family"] != family:
        return _Way(writing)
    # What was read was a part of a model. Now it is whole; its encoders keep the names they had.
    said = {key: kept["config"].get(key, "") for key, value in writing.config.items() if value == ""}
    return _Way(Writing({**writing.config, **said}, writing.names), _names(kept["elsewhere"]), kept["tied"])


def _taken(ours: PublishedFolder, way: _Way, family: str) -> _Taken:
    """Every tensor of theirs: of which of ours it is which part, or which of ours it holds, and its bytes."""
    taken: list[tuple[str, Piece, int]] = []
    lost: list[str] = []
    for name, stored in ours.tensors.items():
        if way.elsewhere.pieces(name, stored.shape) is not None:
            continue
        pieces = way.writing.names.pieces(name, stored.shape) or ()
        lost += [] if pieces else [name]
        taken += [(name, piece, stored.size // len(pieces)) for piece in pieces]
    if any(".lora_" in name for name in lost):
        raise CheckpointError(
            f"{ours.folder}: the model holds low-rank adapters; merge them first, with --merge-adapters"
        )
    if lost:
        raise CheckpointError(
            f"{ours.folder}: {len(lost)} tensors have no place in {family}: {sorted(lost)[:8]}"
        )
    tied = [(name, Piece(theirs), ours.tensors[name].size) for theirs, name in way.tied.items()]
    return _gathered(ours, taken + tied, family)


def _gathered(ours: PublishedFolder, taken: Sequence[tuple[str, Piece, int]], family: str) -> _Taken:
    """The pieces by their names; those of a tensor that holds several of ours in their order."""
    found: dict[str, list[tuple[str, Piece, int]]] = {}
    for entry in sorted(taken, key=lambda entry: entry[1].cut):
        found.setdefault(entry[1].theirs, []).append(entry)
    cut = [theirs for theirs, parts in found.items() if len(parts) != parts[0][1].cut[1]]
    if cut:
        raise CheckpointError(f"{ours.folder}: the model has only a part of what {family} calls {cut[0]}")
    return {
        theirs: ([(name, piece) for name, piece, _ in parts], sum(size for *_, size in parts))
        for theirs, parts in found.items()
    }


def _write_beside(new: Path, folder: Path, way: _Way) -> None:
    """Config, tokenizer, and how answers are generated."""
    write_json(new / "config.json", way.writing.config)
    for name in _BESIDE:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, new / name)
    if way.generation is not None:
        (new / _GENERATION).unlink(missing_ok=True)
        if way.generation:
            write_json(new / _GENERATION, way.generation)


def _names(pairs: Sequence[tuple[str | list[str], str | list[str]]]) -> Names:
    return Names([_rule(theirs, ours) for theirs, ours in pairs])


def _rule(theirs: str | list[str], ours: str | list[str]) -> Rule:
    """The rule whose two sides were written down."""
    if isinstance(ours, str):
        return Rename(theirs, ours) if isinstance(theirs, str) else Stack(tuple(theirs), ours)
    return Cut(str(theirs), tuple(ours))


def _aside(ours: PublishedFolder, scratch: Path) -> list[tuple[PublishedFolder, str]]:
    """The tensors that were kept aside."""
    path = ours.folder / KEPT / "unused.safetensors"
    if not path.is_file() and not path.with_name(f"{path.name}.index.json").is_file():
        return []
    kept = PublishedFolder(ours.folder / KEPT, scratch, stem="unused")
    return [(kept, name) for name in kept.tensors]
