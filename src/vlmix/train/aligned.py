"""Results of solo stages, kept under a digest of all they depend on, so that each is computed once.

An encoder trained alone before a language model comes out the same in every mixture that names it: neither
the other encoders nor the stage's place in the recipe play a part. What it depends on is written down when
the stage begins (``start_of``); the tensors it changed are kept under that digest when it ends (``give``),
and put into the next model that asks for the same (``take``).
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlmix.core.errors import CheckpointError
from vlmix.core.files import publish, read_json, sha256, verify_manifest, write_json, write_manifest
from vlmix.core.settings import Settings, read_settings
from vlmix.models.adapters import AdaptedLinear
from vlmix.models.processing import VlmixProcessor
from vlmix.moe.install import expert_layers
from vlmix.train.build import stage_processor
from vlmix.train.checkpoint import unique_tensors, versions
from vlmix.train.order import DataOrder
from vlmix.train.recipe import Stage
from vlmix.train.solo import Running
from vlmix.train.trainable import Selection

SCHEMA = "vlmix.aligned/1"
FOLDER = ".aligned"  # beside a run's own folder, unless the recipe names another
_NOTES = "aligned.json"
_PROJECTOR = "model.projector."
# What a stage says that changes none of its numbers, or is seen in the weights it starts from.
_FREE: Final = {
    *("name", "train", "layer_decay", "solo", "before", "start_from", "publish", "max_bad"),
    *("save_every_steps", "cache_features", "workers", "worker_timeout"),
}


class Start(Settings):
    """What a solo stage depends on: ``key``, the digest of all, and its ``tensors``' own digests by name."""

    key: str
    tensors: dict[str, str]


@dataclass(frozen=True, slots=True)
class Results:
    """What solo stages of the run in ``out`` take from the folder ``root``, and leave there."""

    root: Path
    out: Path
    console: Console

    def begin(self, stage: Stage, ran: Running, selection: Selection, order: DataOrder) -> Path | None:
        """Take the stage's result if there is one; otherwise note what it starts from, for its end.

        A result that is damaged is said to be so, and computed again.
        """
        if stage.solo is None or not stage.solo.reuse or stage.task or _divided():
            return None
        start, folder = start_of(stage, ran, selection, order), None
        try:
            folder = take(self.root, start, stage, ran)
        except CheckpointError as error:
            self.console.print(f"{error}; it is computed again", markup=False, soft_wrap=True)
        if folder is None:
            write_json(self.out / _NOTES, {**self._notes(), stage.name: start.model_dump()})
        else:
            said = f"stage {stage.name}: not trained; its result was there already: {folder}"
            self.console.print(said, markup=False, soft_wrap=True)
        return folder

    def end(self, stage: Stage, ran: Running) -> None:
        """Keep the result of a stage that has come to its end.

        Raises:
            DiskFullError: if there is no room; what was kept before is intact.

        """
        if (noted := self._notes().get(stage.name)) is not None:
            start = read_settings(Start, noted, _NOTES)
            self.console.print(f"kept    {give(self.root, start, stage, ran)}", markup=False, soft_wrap=True)

    def _notes(self) -> dict[str, Any]:
        return read_json(self.out / _NOTES) if (self.out / _NOTES).is_file() else {}


def start_of(stage: Stage, ran: Running, selection: Selection, order: DataOrder) -> Start:
    """What ``stage`` depends on, asked before its first step.

    Names are those of a model with this one encoder: its number in the whole model is not told.
    """
    tensors = {name: _digest(tensor) for name, tensor in _tensors(stage, ran).items()}
    inputs = {
        "schema": SCHEMA,
        "tensors": tensors,
        "trains": _trains(stage, selection),
        "model": _model(stage, ran),
        "processor": _processor(stage_processor(ran.processor, stage)),
        "stage": stage.model_dump(mode="json", exclude=_FREE),
        "files": {name: _contents(Path(name)) for name in _named(stage)},
        "order": order.fingerprint,
        "device": ran.model.device.type,
        "versions": {name: versions()[name] for name in ("vlmix", "torch", "transformers")},
    }
    told = json.dumps(inputs, sort_keys=True, default=str)
    return Start(key=hashlib.sha256(told.encode()).hexdigest(), tensors=tensors)


def take(root: Path, start: Start, stage: Stage, ran: Running) -> Path | None:
    """Put the result kept under ``root`` into the model and return its folder; ``None`` if there is none.

    Raises:
        CheckpointError: if what is kept is damaged; the model is unchanged.

    """
    folder = root / start.key
    if not folder.is_dir():
        return None
    verify_manifest(folder, SCHEMA)
    stored, ours = load_file(folder / "tensors.safetensors"), _tensors(stage, ran)
    for name, tensor in stored.items():
        if name not in ours or (ours[name].shape, ours[name].dtype) != (tensor.shape, tensor.dtype):
            raise CheckpointError(f"{folder}: {name} has no place in this model")
    with torch.no_grad():
        for name, tensor in stored.items():
            ours[name].copy_(tensor)
    return folder


def give(root: Path, start: Start, stage: Stage, ran: Running) -> Path:
    """Keep under ``root`` every tensor that the stage changed, its own projector left out.

    Of two runs that end at once the later one counts; both computed the same.

    Raises:
        DiskFullError: if there is no room; what was kept before is intact.

    """
    changed = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in _tensors(stage, ran).items()
        if not name.startswith(_PROJECTOR) and _digest(tensor) != start.tensors[name]
    }
    folder = root / start.key
    try:
        with publish(folder) as new:
            save_file(changed, new / "tensors.safetensors")
            write_json(new / "start.json", {"stage": stage.name, **start.model_dump()})
            write_manifest(new, SCHEMA)
    except OSError:
        verify_manifest(folder, SCHEMA)  # another run came first, between looking and renaming
    return folder


def _tensors(stage: Stage, ran: Running) -> dict[str, Tensor]:
    """The solo model's parameters and saved buffers, the encoder's without its number."""
    return {_name(stage, name): tensor for name, tensor in unique_tensors(ran.model).items()}


def _name(stage: Stage, name: str) -> str:
    number = 0 if stage.solo is None else stage.solo.encoder
    return name.replace(f"encoders.{number}.", "encoder.", 1)


def _digest(tensor: Tensor) -> str:
    numbers = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    found.update(numbers.data)
    return found.hexdigest()


def _trains(stage: Stage, selection: Selection) -> list[Any]:
    return [
        [group.learning_rate, group.decay, [_name(stage, name) for name in group.parameters]]
        for group in selection.groups
    ]


def _model(stage: Stage, ran: Running) -> Mapping[str, Any]:
    """The solo model's configuration, and what of adapters and experts on shared modules it does not tell."""
    config, number = ran.model.config, 0 if stage.solo is None else stage.solo.encoder
    text = {key: value for key, value in config.language.to_dict().items() if not key.startswith("_")}
    adapted = {
        _name(stage, name): [layer.scaling, {key: str(drop) for key, drop in layer.lora_dropout.items()}]
        for name, layer in ran.model.named_modules()
        if isinstance(layer, AdaptedLinear)
    }
    places = ((layer.name, layer.settings) for layer in expert_layers(ran.model))
    return {
        "encoder": (config.encoders or [])[number],
        "views": config.views,
        "projector": config.projector,
        "language_model": text,
        "image": [config.image_size, config.image_token_id],
        "adapters": adapted,
        "experts": {
            _name(stage, name): settings.model_dump(mode="json", exclude={"place"})
            for name, settings in places
        },
    }


def _processor(processor: VlmixProcessor) -> Mapping[str, str]:
    """Digests of the files it would be saved as: its tokenizer, templates and settings."""
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        return {path.name: sha256(path) for path in sorted(Path(folder).iterdir())}


def _named(stage: Stage) -> list[str]:
    """The files and folders that sources of the stage name."""
    found = [text for data in stage.data for text in _texts(data.source)]
    return sorted({text for text in found if Path(text).exists()})


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for item in value.values() for text in _texts(item))
    elif isinstance(value, list | tuple):
        yield from (text for item in value for text in _texts(item))


def _contents(path: Path) -> object:
    """A file's digest; of a folder, which may hold a million pictures, the names and sizes in it."""
    if path.is_file():
        return sha256(path)
    return sorted([item.name, item.stat().st_size if item.is_file() else 0] for item in path.iterdir())


def _divided() -> bool:
    """Whether several processes train together: none of them has every tensor whole."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
