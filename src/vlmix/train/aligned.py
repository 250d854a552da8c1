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
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from vlmix.core.errors import CheckpointError
from vlmix.core.files import publish, read_json, sha256, verify_manifest, write_json, write_manifest
from vlmix.core.settings import Settings, read_settings
from vlmix.models.adapters import AdaptedLinear
from vlmix.models.processing import VlmixProcessor
from vlmix.moe.install import expert_layers
from vlmix.train.build import stage_processor
from vlmix.train.checkpoint import unique_tensors
from vlmix.train.order import DataOrder
from vlmix.train.parallel.pieces import Stored
from vlmix.train.parallel.processes import Processes
from vlmix.train.parallel.sharding import whole_tensors
from vlmix.train.recipe import Stage
from vlmix.train.solo import Running
from vlmix.train.trainable import Selection

SCHEMA = "vlmix.aligned/1"
_LIBRARIES = ("vlmix", "torch", "transformers", "timm")
FOLDER = ".aligned"  # beside a run's own folder, unless the recipe names another
_NOTES, _TENSORS = "aligned.json", "tensors"
_PROJECTOR = "model.projector."
# What a stage says that changes none of its numbers, or is seen in the weights it starts from.
_FREE: Final = {
    *("name", "train", "layer_decay", "solo", "before", "start_from", "publish", "max_bad"),
    *("save_every_steps", "cache_features", "workers", "worker_timeout", "tell_samples"),
}


class Start(Settings):
    """What a solo stage depends on: ``key``, the digest of all, and its ``tensors``' own digests by name."""

    key: str
    tensors: dict[str, str]


@dataclass(frozen=True, slots=True)
class Results:
    """What solo stages of the run in ``out`` take from the folder ``root``, and leave there.

    All processes of the run must ask; the first reads notes and writes.
    """

    root: Path
    out: Path
    console: Console
    team: Processes = field(default_factory=Processes)

    def begin(
        self, stage: Stage, ran: Running, selection: Selection, order: DataOrder, *, looks_ahead: bool
    ) -> Path | None:
        """Take the stage's result if there is one; otherwise note what it starts from, for its end.

        Encoders that look ahead of the model see batches of another size, which shows in last bits. A result
        that is damaged is said to be so, and computed again.
        """
        if stage.solo is None or not stage.solo.reuse or stage.task:
            return None
        start, folder = start_of(stage, ran, selection, order, self.team, looks_ahead=looks_ahead), None
        try:
            folder = take(self.root, start, stage, ran, self.team)
        except CheckpointError as error:
            self.console.print(f"{error}; it is computed again", markup=False, soft_wrap=True)
        if folder is not None:
            said = f"stage {stage.name}: not trained; its result was there already: {folder}"
            self.console.print(said, markup=False, soft_wrap=True)
        elif self.team.is_main:
            write_json(self.out / _NOTES, {**self._notes(), stage.name: start.model_dump()})
        return folder

    def end(self, stage: Stage, ran: Running) -> None:
        """Keep the result of a stage that has come to its end.

        Raises:
            DiskFullError: if there is no room; what was kept before is intact.

        """
        noted = self._notes().get(stage.name) if self.team.is_main else None
        told = json.loads(self.team.share(json.dumps(noted)))
        if told is not None:
            folder = give(self.root, read_settings(Start, told, _NOTES), stage, ran, self.team)
            self.console.print(f"kept    {folder}", markup=False, soft_wrap=True)

    def _notes(self) -> dict[str, Any]:
        return read_json(self.out / _NOTES) if (self.out / _NOTES).is_file() else {}


def start_of(
    stage: Stage,
    ran: Running,
    selection: Selection,
    order: DataOrder,
    team: Processes,
    *,
    looks_ahead: bool,
) -> Start:
    """What ``stage`` depends on, asked before its first step.

    Names are those of a model with this one encoder: its number in the whole model is not told. Several
    processes sum in another order and draw from streams of their own, so their number counts.
    """
    tensors = {name: _digest(each) if team.is_main else "" for name, each in _gathered(stage, ran)}
    key = ""
    if team.is_main:
        inputs = {
            "schema": SCHEMA,
            "tensors": tensors,
            "trains": _trains(stage, selection),
            "model": _model(stage, ran),
            "processor": _processor(stage_processor(ran.processor, stage)),
            "stage": stage.model_dump(mode="json", exclude=_FREE),
            "files": {name: _contents(Path(name)) for name in _named(stage)},
            "order": order.fingerprint,
            "device": (team.device if team.world > 1 else ran.model.device).type,
            "processes": _division(team),
            "looks_ahead": looks_ahead,
            "versions": {name: version(name) for name in _LIBRARIES},
        }
        key = hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()
    return Start(key=team.share(key), tensors=tensors)


def take(root: Path, start: Start, stage: Stage, ran: Running, team: Processes) -> Path | None:
    """Put the result kept under ``root`` into the model and return its folder; ``None`` if there is none.

    Raises:
        CheckpointError: if what is kept is damaged; the model is unchanged.

    """
    folder = root / start.key
    if not team.any(team.is_main and folder.is_dir()):
        return None
    with team.together(f"reading {folder}"):
        if team.is_main:
            verify_manifest(folder, SCHEMA)
        stored, ours = Stored(folder, _TENSORS), _tensors(stage, ran)
        for name in sorted(stored.names):
            found = (stored.shape(name), stored.dtype(name))
            if name not in ours or (tuple(ours[name].shape), ours[name].dtype) != found:
                raise CheckpointError(f"{folder}: {name} has no place in this model")
    for name in sorted(stored.names):
        stored.fill(name, ours[name])
    return folder


def give(root: Path, start: Start, stage: Stage, ran: Running, team: Processes) -> Path:
    """Keep under ``root`` every tensor that the stage changed, its own projector left out.

    Of two runs that end at once the later one counts; both computed the same.

    Raises:
        DiskFullError: if there is no room; what was kept before is intact.

    """
    changed = {
        name: tensor.cpu().contiguous()
        for name, tensor in _gathered(stage, ran)
        if team.is_main and not name.startswith(_PROJECTOR) and _digest(tensor) != start.tensors[name]
    }
    folder = root / start.key
    with team.together(f"keeping {folder}"):
        if team.is_main:
            _keep(folder, changed, {"stage": stage.name, **start.model_dump()})
    return folder


def _keep(folder: Path, changed: Mapping[str, Tensor], start: Mapping[str, Any]) -> None:
    try:
        with publish(folder) as new:
            save_file(dict(changed), new / f"{_TENSORS}.safetensors")
            write_json(new / "start.json", start)
            write_manifest(new, SCHEMA)
    except OSError:
        verify_manifest(folder, SCHEMA)  # another run came first, between looking and renaming


def _gathered(stage: Stage, ran: Running) -> Iterator[tuple[str, Tensor]]:
    """The tensors by name, each whole on every process in turn."""
    return whole_tensors(_tensors(stage, ran))


def _division(team: Processes) -> list[Any] | None:
    """What of several processes changes a result."""
    if team.world == 1:
        return None
    settings = team.settings
    return [team.world, settings.kind, settings.shard, settings.reduce]


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
