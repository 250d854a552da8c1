"""Checkpoints that are a part of a model: what the first stage trained, and low-rank changes to a base.

Both are shown to the families as the whole folder that the authors' code makes of them in memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from vlmix.convert._names import Box
from vlmix.convert._source import PublishedFolder, Stored, read_tensor
from vlmix.core.errors import CheckpointError
from vlmix.core.progress import Told, quiet

_ADAPTERS, _LORA = "adapter_config.json", ".lora_{}.weight"
_WRAPPER = "base_model.model."
# What else peft can put into an adapter: merging would need more than B A. Some start by changing the base.
_PLAIN: Mapping[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "init_lora_weights": (True, False, "gaussian", None),
}


@dataclass(frozen=True)
class Beside:
    """Folders that a checkpoint refers to: a decoder, the base of adapters, encoders by name."""

    language_model: Path | None = None
    base: Path | None = None
    towers: Mapping[str, Path] = field(default_factory=dict)


def opened(source: Path, scratch: Path, beside: Beside, told: Told = quiet) -> PublishedFolder:
    """The checkpoint in ``source``, made whole with what lies beside it.

    Raises:
        CheckpointError: if a folder is missing that it needs, or one is given that it does not.

    """
    folder = PublishedFolder(source, scratch, towers=beside.towers, told=told)
    lora = (source / _ADAPTERS).is_file()
    if lora and beside.base is None:
        named = _adapter_config(source).get("base_model_name_or_path", "its base")
        raise CheckpointError(
            f"{source}: holds adapters (LoRA) that change another model, {named}. Give that model's folder "
            "with --base DIR: the changes are merged into it"
        )
    if beside.base is not None and not lora:
        raise CheckpointError(
            f"{source}: has no {_ADAPTERS}, so --base has no use. For the decoder of a first stage's "
            "mm_projector.bin give --language-model DIR"
        )
    if beside.base is not None:
        folder = Adapted(folder, PublishedFolder(beside.base, scratch, told=told))
    if beside.language_model is not None:
        folder = StageOne(folder, PublishedFolder(beside.language_model, scratch, told=told))
    return folder


class _Joined(PublishedFolder):
    """What is new, and the folder of weights it belongs to."""

    whole = False

    def __init__(self, new: PublishedFolder, old: PublishedFolder) -> None:
        super().__init__(new.folder, new.scratch, towers=new.towers, told=new.told)
        self.new, self.old = new, old

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The new part's, which holds the decoder's keys too, or the old one's where it has none."""
        return self.new.config or self.old.config

    @cached_property
    def generation(self) -> Mapping[str, Any]:
        """How answers are generated."""
        return self.new.generation or self.old.generation

    @property
    def folders(self) -> list[Path]:
        """Where the parts lie."""
        return [*self.new.folders, *self.old.folders]


class StageOne(_Joined):
    """Projector, fusion and perhaps encoders, as the first stage leaves them, on a decoder of its own folder.

    Raises:
        CheckpointError: if both hold the same tensor.

    """

    @cached_property
    def tensors(self) -> Mapping[str, Stored]:
        """Those of both folders."""
        both = sorted(self.new.tensors.keys() & self.old.tensors.keys())
        if both:
            raise CheckpointError(
                f"{self.folder}: holds {both[0]!r}, and so does {self.old.folder}. A folder with a decoder "
                "needs no --language-model"
            )
        return {**self.old.tensors, **self.new.tensors}

    @property
    def decoder(self) -> Mapping[str, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The decoder's own config."""
        return self.old.config

    def tensor(self, name: str, box: Box = ()) -> Tensor:
        """One tensor or a part of it."""
        return (self.new if name in self.new.tensors else self.old).tensor(name, box)


class Adapted(_Joined):
    """A base with low-rank changes merged into it: W + alpha / r B A (LoRA, arXiv:2106.09685, section 4.1).

    Next to the adapters LLaVA keeps what it trained whole, such as the projector, in
    ``non_lora_trainables.bin``; those replace the base's.

    Raises:
        CheckpointError: if the adapters are of another kind, or change what the base has not.

    """

    @cached_property
    def tensors(self) -> Mapping[str, Stored]:
        """The base's, and those trained whole."""
        config = _adapter_config(self.folder)
        wrong = {key: config[key] for key, fine in _PLAIN.items() if config.get(key, fine[0]) not in fine}
        if wrong:
            raise CheckpointError(
                f"{self.folder / _ADAPTERS}: {wrong} is not read. Merge these adapters where they were made, "
                "with peft's `merge_and_unload`, and convert the merged folder"
            )
        unknown = sorted(self._changes.keys() - self.old.tensors.keys())
        if unknown:
            raise CheckpointError(
                f"{self.folder}: changes {len(unknown)} weights that {self.old.folder} has not: {unknown[:8]}"
            )
        return {**self.old.tensors, **{ours: self._stored[theirs] for ours, theirs in self._replaced.items()}}

    def tensor(self, name: str, box: Box = ()) -> Tensor:
        """One tensor or a part of it, with its change."""
        if name in self._replaced:
            return read_tensor(self.tensors[name], self._replaced[name], box)
        if name not in self._changes:
            return self.old.tensor(name, box)
        down, up = (read_tensor(self._stored[key], key).float() for key in self._changes[name])
        weight = self.old.tensor(name)
        if (up.shape[0], down.shape[1]) != tuple(weight.shape):
            raise CheckpointError(f"{self.folder}: its change of {name} is of another shape than the base")
        return (weight.float() + self._scale(down.shape[0]) * (up @ down)).to(weight.dtype)[box]

    @cached_property
    def _stored(self) -> dict[str, Stored]:
        folder = self.new.folder
        adapters = [folder / f"adapter_model.{ending}" for ending in ("safetensors", "bin")]
        present = [path for path in adapters if path.is_file()][:1]
        if not present:
            raise CheckpointError(f"{folder}: holds neither {' nor '.join(path.name for path in adapters)}")
        trained = folder / "non_lora_trainables.bin"
        return self.new.read([*present, *([trained] if trained.is_file() else [])])

    @cached_property
    def _changes(self) -> dict[str, tuple[str, str]]:
        """Their names of A and B for each weight that is changed."""
        found: dict[str, dict[str, str]] = {}
        for name in self._stored:
            for side in "AB":
                if (stem := _plain(name).removesuffix(_LORA.format(side))) != _plain(name):
                    found.setdefault(f"{stem}.weight", {})[side] = name
        single = [name for name, sides in found.items() if len(sides) != 2]
        if single:
            raise CheckpointError(f"{self.folder}: only one of lora_A and lora_B is there for {single[0]}")
        return {name: (sides["A"], sides["B"]) for name, sides in found.items()}

    @cached_property
    def _replaced(self) -> dict[str, str]:
        """Their name of each tensor that was trained whole."""
        used = {name for pair in self._changes.values() for name in pair}
        return {_plain(name): name for name in self._stored if name not in used}

    def _scale(self, rank: int) -> float:
        config = _adapter_config(self.folder)
        return float(config["lora_alpha"]) / (rank**0.5 if config.get("use_rslora") else rank)


def _plain(name: str) -> str:
    """A tensor's name without the wrappers of peft."""
    return name.removeprefix(_WRAPPER).replace(".default.weight", ".weight")


def _adapter_config(folder: Path) -> Mapping[str, Any]:
    try:
        return dict(json.loads((folder / _ADAPTERS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / _ADAPTERS}: cannot be read as JSON: {error}") from None
