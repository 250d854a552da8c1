"""``vlmix convert``: read, account for every tensor, and only then write."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, GenerationConfig

from vlmix.convert._account import Account, account, finite
from vlmix.convert._compose import Beside, opened
from vlmix.convert._family import Family, Reading
from vlmix.convert._names import Names
from vlmix.convert._own import KEPT, SCHEMA, is_own
from vlmix.convert._prompt import longest, published_template
from vlmix.convert._shards import ShardWriter
from vlmix.convert._source import PublishedFolder
from vlmix.convert.registry import FAMILIES
from vlmix.core.errors import CheckpointError, VlmixError
from vlmix.core.files import publish, write_json, write_manifest
from vlmix.core.progress import Told, quiet
from vlmix.models.configuration import VlmixConfig
from vlmix.models.image_processing import VlmixImageProcessor
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.models.processing import VlmixProcessor

READING = "reading.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


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
    beside: Beside | None = None,
    told: Told = quiet,
) -> Converted:
    """Read the published folder ``source`` and write the vlmix model folder ``target``.

    Tensors that have no place here are kept under ``target/published`` for the way back. ``tokenizer`` is a
    folder with one, where ``source`` has none. ``change`` corrects the settings that were read, where shapes
    do not show them, such as the heads of an unusual tower. ``beside`` names folders that ``source`` refers
    to. ``told`` is called with what is being done, bytes done and bytes in all. No more of the weights is
    held in memory than one shard of the result.

    Raises:
        CheckpointError: if the family is unknown, or a tensor is missing, left over, of another shape or
            type, or holds a number that is not finite. Nothing is written then.
        DiskFullError: if there is no room.

    """
    if target.exists():
        raise CheckpointError(f"{target} exists already; choose another folder")
    if is_own(source):
        raise CheckpointError(
            f"{source} is a vlmix model already. To write it as its authors' code reads it: vlmix convert "
            f"{source} DIR --to FAMILY, one of {', '.join(FAMILIES.names())}. To leave out an encoder: "
            "--drop-encoder N"
        )
    # Beside the target: copies of pickles need room, which a folder for temporary files may not have.
    room = next(parent for parent in target.absolute().parents if parent.is_dir())
    with TemporaryDirectory(dir=room, prefix=f".{target.name}.", suffix=".unfinished") as scratch:
        folder = opened(source, Path(scratch), beside or Beside(), told)
        name, family = recognise(folder)
        with _understood(folder):
            reading = family.read(folder)
            _check_towers(folder)
            settings = change(dict(reading.config))
            # Where no token of theirs stands for a picture, one behind the vocabulary does.
            behind = {"image_token_id": int(settings["text_config"].get("vocab_size", 32000))}
            config = VlmixConfig(**{**behind, **settings})
            found = account(folder, reading, config)
        with publish(target) as new:
            processor = _processor(new, tokenizer, folder, reading, config)
            _write_model(new, found, config, told)
            _generation(folder, config, processor).save_pretrained(new)
            _write_kept(new / KEPT, folder, found, name, reading)
            write_manifest(new, SCHEMA)
    kept = {theirs: reason for _, theirs, reason in found.kept}
    tied = {twin.theirs: f"equal to {twin.same}" for twin in found.twins}
    return Converted(name, len(found.moves), {**kept, **tied}, processor is not None)


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


@contextmanager
def _understood(folder: PublishedFolder) -> Iterator[None]:
    """Turn what a value of a wrong kind in ``config.json`` sets off, here or in a library, into one error."""
    try:
        yield
    except VlmixError:
        raise
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        StrictDataclassError,
        TypeError,
        ValueError,
    ) as error:
        raise CheckpointError(
            f"{folder.folder / 'config.json'}: a value in it cannot be used: {type(error).__name__}: {error}"
        ) from error


def _check_towers(folder: PublishedFolder) -> None:
    """Refuse a tower that the checkpoint does not name."""
    known = {name for asked in folder.asked for name in (asked, Path(asked).name)}
    for name in folder.towers.keys() - known:
        raise CheckpointError(
            f"--tower {name}: {folder.folder} names no such encoder; it names {', '.join(folder.asked)}"
        )


def _write_model(new: Path, found: Account, config: VlmixConfig, told: Told) -> None:
    writer = ShardWriter(new)
    widest: torch.dtype | None = None
    done, total = 0, sum(move.size for move in found.moves)
    for move in found.moves:
        writer.make_room(move.size)
        tensor = move.read()
        widest = torch.promote_types(widest or tensor.dtype, tensor.dtype)
        writer.add(move.ours, tensor)
        done += move.size
        told("writing", done, total)
    writer.close()
    config.dtype = widest  # what all are loaded as: no tensor loses bits
    config.architectures = [VlmixForConditionalGeneration.__name__]
    config.save_pretrained(new)


def _generation(
    folder: PublishedFolder, config: VlmixConfig, processor: VlmixProcessor | None
) -> GenerationConfig:
    """Answers end where the authors say, and where the chat template ends them."""
    theirs = folder.generation.get("eos_token_id", config.language.eos_token_id)
    stops = [theirs] if isinstance(theirs, int) else list(theirs or ())
    stops += [] if processor is None else processor.stop_token_ids
    ends = list(dict.fromkeys(stops))
    bos = folder.generation.get("bos_token_id", config.language.bos_token_id)
    pad = None if processor is None else processor.tokenizer.pad_token_id
    return GenerationConfig(
        bos_token_id=bos, eos_token_id=ends[0] if len(ends) == 1 else ends or None, pad_token_id=pad
    )


def _write_kept(target: Path, folder: PublishedFolder, found: Account, family: str, reading: Reading) -> None:
    """What the way back needs: their config, and the tensors that have no place here."""
    target.mkdir()
    kept = [(theirs, reason) for part, theirs, reason in found.kept if part is folder]
    said = {
        "family": family,
        "whole": folder.whole,
        "unused": dict(kept),
        "config": dict(folder.config),
        "generation_config": dict(folder.generation),
        "renames": _rules(found.stand_ins + reading.names),
        "tied": {twin.theirs: twin.ours for twin in found.twins},
        "elsewhere": [rule for _, names in reading.towers for rule in _rules(names)],
    }
    write_json(target / READING, said)
    writer = ShardWriter(target, stem="unused")
    for theirs, _ in kept:
        writer.make_room(folder.tensors[theirs].size)
        writer.add(theirs, finite(folder, theirs))
    writer.close()


def _rules(names: Names) -> list[list[Any]]:
    return [[rule.theirs, rule.ours] for rule in names.renames]


def _processor(
    new: Path, tokenizer: Path | None, folder: PublishedFolder, reading: Reading, config: VlmixConfig
) -> VlmixProcessor | None:
    """Save the processor where a tokenizer is at hand, and let the config know its image token."""
    places = [tokenizer] if tokenizer is not None else folder.folders
    found = [place for place in places if any((place / name).is_file() for name in _TOKENIZERS)]
    if not found:
        return None
    images = VlmixImageProcessor.of(config, reading.fit)
    words = AutoTokenizer.from_pretrained(found[0], local_files_only=True)
    if words.pad_token is None:  # a token of its own would have no row in the embedding table
        words.pad_token = words.unk_token or words.eos_token
    processor = VlmixProcessor(
        images,
        words,
        chat_template=published_template(reading.chat_template, folder.config, words),
        image_seq_length=config.image_seq_length,
        max_length=longest(folder.config),
        reads_instruction=config.reads_instruction,
    )
    config.image_token_id = processor.image_token_id
    processor.save_pretrained(new)
    return processor
