"""``vlmix convert --to FAMILY``: a vlmix model folder in the layout the authors' own code reads."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vlmix.convert._family import FAMILIES, Writing
from vlmix.convert._names import Names, Rename
from vlmix.convert._shards import ShardWriter
from vlmix.convert._source import PublishedFolder
from vlmix.convert.run import KEPT, READING
from vlmix.core.errors import CheckpointError
from vlmix.core.files import publish, read_json, verify_manifest, write_json
from vlmix.models.configuration import VlmixConfig
from vlmix.models.loading import model_folder

_BESIDE = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)


def export(source: Path, target: Path, family: str) -> int:
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
    folder = model_folder(source)
    if (folder / "manifest.json").is_file():
        verify_manifest(folder)
    with TemporaryDirectory() as scratch:
        ours = PublishedFolder(folder, Path(scratch))
        writing, elsewhere = _writing(folder, family)
        taken = [name for name in ours.tensors if elsewhere.theirs(name) is None]
        lost = [name for name in taken if writing.names.theirs(name) is None]
        if lost:
            raise CheckpointError(
                f"{folder}: {len(lost)} tensors have no place in {family}: {sorted(lost)[:8]}"
            )
        with publish(target) as new:
            writer, count = ShardWriter(new), 0
            for part, name in [*((ours, name) for name in taken), *_aside(ours, Path(scratch))]:
                theirs = name if part is not ours else writing.names.theirs(name)
                writer.add(str(theirs), part.tensor(name))
                count += 1
            writer.close()
            write_json(new / "config.json", writing.config)
            for name in _BESIDE:
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, new / name)
    return count


def _writing(folder: Path, family: str) -> tuple[Writing, Names]:
    """As it was read where it came from this family, else as the family writes a model of its kind.

    The second are names of towers that lay in folders of their own and stay there.
    """
    cls, path = FAMILIES.get(family), folder / KEPT / READING
    if path.is_file():
        kept: Mapping[str, Any] = read_json(path)
        if kept["family"] == family:
            names, elsewhere = (_rules(kept[key]) for key in ("renames", "elsewhere"))
            return Writing(kept["config"], names), elsewhere
    return cls.write(VlmixConfig.from_pretrained(folder)), Names(())


def _rules(pairs: Sequence[tuple[str, str]]) -> Names:
    return Names([Rename(theirs, ours) for theirs, ours in pairs])


def _aside(ours: PublishedFolder, scratch: Path) -> list[tuple[PublishedFolder, str]]:
    """The tensors that were kept aside."""
    path = ours.folder / KEPT / "unused.safetensors"
    if not path.is_file() and not path.with_name(f"{path.name}.index.json").is_file():
        return []
    kept = PublishedFolder(ours.folder / KEPT, scratch, stem="unused")
    return [(kept, name) for name in kept.tensors]
