"""``vlmix convert``: read, account for every tensor, and only then write."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig

from vlmix.convert._family import FAMILIES, Family, Reading
from vlmix.convert._shards import ShardWriter
from vlmix.convert._source import PublishedFolder
from vlmix.core.errors import CheckpointError
from vlmix.core.files import publish, write_json, write_manifest
from vlmix.models.configuration import VlmixConfig
from vlmix.models.image_processing import VlmixImageProcessor
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.models.processing import VlmixProcessor

KEPT, READING = "published", "reading.json"
_SCHEMA = "vlmix.model/1"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True, slots=True)
class Move:
    """One tensor on its way: from which folder, under which name, and what it is called here."""

    folder: PublishedFolder
    theirs: str
    ours: str


@dataclass(frozen=True, slots=True)
class Converted:
    """What was done: the family, tensors moved, and those kept aside with the reason."""

    family: str
    moved: int
    kept: Mapping[str, str]
    processor: bool


def convert(
    source: Path,
    target: Path,
    tokenizer: Path | None = None,
    change: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> Converted:
    """Read the published folder ``source`` and write the vlmix model folder ``target``.

    Tensors that have no place here are kept under ``target/published`` for the way back. ``tokenizer`` is a
    folder with one, where ``source`` has none. ``change`` corrects the settings that were read, where shapes
    do not show them, such as the heads of an unusual tower.

    Raises:
        CheckpointError: if the family is unknown, or a tensor is missing, left over, of another shape or
            type, or holds a number that is not finite. Nothing is written then.
        DiskFullError: if there is no room.

    """
    if target.exists():
        raise CheckpointError(f"{target} exists already; choose another folder")
    with TemporaryDirectory() as scratch:
        folder = PublishedFolder(source, Path(scratch))
        name, family = recognise(folder)
        reading = family.read(folder)
        settings = change(dict(reading.config))
        # Where no token of theirs stands for a picture, one behind the vocabulary does.
        behind = {"image_token_id": int(settings["text_config"].get("vocab_size", 32000))}
        config = VlmixConfig(**{**behind, **settings})
        moves, kept = _moves(folder, reading, config)
        with publish(target) as new:
            processor = _processor(new, tokenizer or source, reading, config)
            _write_model(new, moves, config)
            _write_kept(new / KEPT, folder, kept, name, reading)
            write_manifest(new, _SCHEMA)
    return Converted(name, len(moves), {move.theirs: reason for move, reason in kept}, processor)


def recognise(folder: PublishedFolder) -> tuple[str, type[Family]]:
    """The one family whose layout this is.

    Raises:
        CheckpointError: if no family or more than one fits.

    """
    found = [name for name in FAMILIES.names() if FAMILIES.get(name).recognises(folder)]
    if len(found) != 1:
        what = "fits no known family" if not found else f"fits several families: {', '.join(found)}"
        some = ", ".join(sorted(folder.tensors)[:3])
        raise CheckpointError(
            f"{folder.folder}: {what}. Architecture {folder.config.get('architectures')}, tensors such as "
            f"{some}. Known: {', '.join(FAMILIES.names())}"
        )
    return found[0], FAMILIES.get(found[0])


def wanted_shapes(config: VlmixConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's saved tensors, tied ones once; nothing is allocated."""
    with torch.device("meta"):
        model = VlmixForConditionalGeneration(config)
    seen: set[int] = set()
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            shapes[name] = tuple(tensor.shape)
    return shapes


def _moves(
    folder: PublishedFolder, reading: Reading, config: VlmixConfig
) -> tuple[list[Move], list[tuple[Move, str]]]:
    """Every tensor's way, or an error that lists all that have none."""
    wanted = wanted_shapes(config)
    moves: dict[str, Move] = {}
    kept: list[tuple[Move, str]] = []
    faults: list[str] = []
    for part, names in ((folder, reading.names), *reading.towers):
        for theirs, stored in part.tensors.items():
            reason, ours = names.reason(theirs), names.ours(theirs)
            if reason is not None:
                kept.append((Move(part, theirs, ""), reason))
            elif ours is None or ours not in wanted:
                faults.append(f"left over: {theirs}")
            elif stored.shape != wanted[ours]:
                faults.append(f"{theirs} is {stored.shape}, here {wanted[ours]}")
            elif not stored.dtype.startswith(("F", "BF")):
                faults.append(f"{theirs} is {stored.dtype}, not floating point")
            else:
                moves[ours] = Move(part, theirs, ours)
    faults += [f"missing: {name}" for name in wanted.keys() - moves.keys()]
    if faults:
        shown = "\n  ".join(sorted(faults)[:20])
        raise CheckpointError(f"{folder.folder}: {len(faults)} tensors do not fit:\n  {shown}")
    return [moves[name] for name in wanted], kept


def _write_model(new: Path, moves: Sequence[Move], config: VlmixConfig) -> None:
    writer = ShardWriter(new)
    types = set[str]()
    for move, tensor in _read(moves):
        types.add(str(tensor.dtype).removeprefix("torch."))
        writer.add(move.ours, tensor)
    writer.close()
    config.dtype = min(types)
    config.architectures = [VlmixForConditionalGeneration.__name__]
    config.save_pretrained(new)
    eos = config.language.eos_token_id
    GenerationConfig(bos_token_id=config.language.bos_token_id, eos_token_id=eos).save_pretrained(new)


def _read(moves: Sequence[Move]) -> Iterator[tuple[Move, Tensor]]:
    for move in moves:
        tensor = move.folder.tensor(move.theirs)
        if not bool(torch.isfinite(tensor).all()):
            file = move.folder.tensors[move.theirs].file
            raise CheckpointError(f"{file}: {move.theirs} holds a number that is not finite")
        yield move, tensor


def _write_kept(
    target: Path, folder: PublishedFolder, kept: Sequence[tuple[Move, str]], family: str, reading: Reading
) -> None:
    """What the way back needs: their config, and the tensors that have no place here."""
    target.mkdir()
    reasons = {move.theirs: reason for move, reason in kept if move.folder is folder}
    found = {
        "family": family,
        "unused": reasons,
        "config": dict(folder.config),
        "renames": [[rule.theirs, rule.ours] for rule in reading.names.renames],
        "elsewhere": [[rule.theirs, rule.ours] for _, names in reading.towers for rule in names.renames],
    }
    write_json(target / READING, found)
    writer = ShardWriter(target, stem="unused")
    for move, _ in kept:
        if move.folder is folder:
            writer.add(move.theirs, folder.tensor(move.theirs))
    writer.close()


def _processor(new: Path, tokenizer: Path, reading: Reading, config: VlmixConfig) -> bool:
    """Save the processor where a tokenizer is at hand, and let the config know its image token."""
    if not any((tokenizer / name).is_file() for name in _TOKENIZERS):
        return False
    images = VlmixImageProcessor(config.image_size, reading.fit)
    words = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    if words.pad_token is None:  # a token of its own would have no row in the embedding table
        words.pad_token = words.unk_token or words.eos_token
    processor = VlmixProcessor(
        images,
        words,
        chat_template=reading.chat_template,
        image_seq_length=config.image_seq_length,
    )
    config.image_token_id = processor.image_token_id
    processor.save_pretrained(new)
    return True
