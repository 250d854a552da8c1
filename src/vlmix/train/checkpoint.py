"""Checkpoints: a folder of safetensors and JSON, published whole, found again by checking every byte."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from vlmix import __version__
from vlmix.core.errors import CheckpointError, InputError
from vlmix.core.files import (
    MANIFEST,
    discard,
    publish,
    read_json,
    sha256,
    verify_manifest,
    write_json,
    write_manifest,
)
from vlmix.core.settings import Settings, read_settings

SCHEMA = "vlmix.checkpoint/1"
KEPT = 2
CHECKPOINTS, SETUP = "checkpoints", "setup"  # in a run's folder: these, and the configuration they are of


class RunState(Settings):
    """Where a run stands: ``step`` of ``steps`` optimizer steps of a stage are done, ``global_step`` in all.

    ``order`` is the data order's fingerprint; ``ledgers`` the counts of good and bad rows by stage.
    """

    stage: str
    stage_index: int
    step: int
    steps: int
    global_step: int
    seed: int
    order: str
    ledgers: dict[str, dict[str, Any]]
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class Found:
    """The newest checkpoint that is whole, and what is wrong with newer ones."""

    folder: Path
    state: RunState
    problems: tuple[str, ...]


def versions() -> dict[str, str]:
    """Versions of what decides the numbers of a run."""
    return {
        "vlmix": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "python": platform.python_version(),
    }


def save(
    root: Path, state: RunState, model: nn.Module, named: Mapping[str, nn.Parameter], optimizer: Optimizer
) -> Path:
    """Publish a checkpoint under ``root`` and remove those before the last two.

    ``named`` gives the optimizer's parameters their names.

    Raises:
        DiskFullError: if there is no room; the checkpoints there are intact.

    """
    folder = root / f"{state.stage_index + 1}-{state.stage}-{state.step:07d}"
    before = [path for path, known in _candidates(root) if _place(known) < _place(state)]
    with publish(folder) as new:
        save_file(_stored(unique_tensors(model)), new / "model.safetensors")
        save_file(_stored(_optimizer_tensors(named, optimizer)), new / "optimizer.safetensors")
        save_file(_random_state(), new / "rng.safetensors")
        write_json(new / "state.json", state.model_dump())
        write_manifest(new, SCHEMA, parent=sha256(before[0] / MANIFEST) if before else "")
    for path in before[KEPT - 1 :]:
        discard(path)
    return folder


def newest(root: Path) -> Found | None:
    """The newest whole checkpoint under ``root``; ``None`` if there never was one.

    Raises:
        CheckpointError: if there are checkpoints but none is whole.

    """
    problems: list[str] = []
    for folder, state in _candidates(root, problems):
        try:
            verify_manifest(folder, SCHEMA)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        return Found(folder, state, tuple(problems))
    if problems:
        raise CheckpointError("no checkpoint is whole:\n" + "\n".join(problems))
    return None


def load_weights(folder: Path, model: nn.Module) -> None:
    """Copy a checkpoint's weights into ``model``.

    Raises:
        CheckpointError: if a tensor is missing, left over or of another shape or type.

    """
    _copy_all(load_file(folder / "model.safetensors"), unique_tensors(model), folder)


def load_optimizer(folder: Path, named: Mapping[str, nn.Parameter], optimizer: Optimizer) -> None:
    """Give the optimizer the state it had.

    Raises:
        CheckpointError: if the state is of parameters that do not train here.

    """
    for name, tensor in load_file(folder / "optimizer.safetensors").items():
        key, _, parameter = name.partition("|")
        if parameter not in named:
            raise CheckpointError(
                f"{folder}: optimizer state of {parameter!r}, which this stage does not train"
            )
        owner = named[parameter]
        device = torch.device("cpu") if key == "step" else owner.device  # where AdamW itself keeps them
        # A clone: memory mapped from a file is aligned differently, which can change the last bit of a sum.
        optimizer.state[owner][key] = tensor.to(device).clone()


def load_random_state(folder: Path) -> None:
    """Give torch's generators the state they had."""
    states = load_file(folder / "rng.safetensors")
    torch.set_rng_state(states["cpu"].clone())
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None and device.type in states:
        torch.get_device_module(device).set_rng_state(states[device.type].clone())


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name; tied ones once, under their first name."""
    seen: set[int] = set()
    result: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            result[name] = tensor
    return result


def _stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _optimizer_tensors(named: Mapping[str, nn.Parameter], optimizer: Optimizer) -> dict[str, Tensor]:
    return {
        f"{key}|{name}": value
        for name, parameter in named.items()
        if parameter in optimizer.state
        for key, value in optimizer.state[parameter].items()
    }


def _random_state() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None:
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


def _copy_all(stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor], folder: Path) -> None:
    missing, extra = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    if missing or extra:
        raise CheckpointError(
            f"{folder} does not fit this model: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(extra)} left over {extra[:3]}"
        )
    for name, tensor in wanted.items():
        theirs = stored[name]
        if theirs.shape != tensor.shape or theirs.dtype != tensor.dtype:
            raise CheckpointError(
                f"{folder}: {name} is {theirs.dtype} {tuple(theirs.shape)}, "
                f"here {tensor.dtype} {tuple(tensor.shape)}"
            )
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(stored[name])


def _candidates(root: Path, problems: list[str] | None = None) -> list[tuple[Path, RunState]]:
    """Checkpoint folders with a readable state, newest first; the others' faults go to ``problems``."""
    found: list[tuple[Path, RunState]] = []
    for folder in sorted(root.glob("[!.]*")):
        try:
            found.append((folder, read_settings(RunState, read_json(folder / "state.json"))))
        except (InputError, TypeError, ValueError) as error:
            if problems is not None:
                problems.append(f"{folder}: {error}")
    return sorted(found, key=lambda item: _place(item[1]), reverse=True)


def _place(state: RunState) -> tuple[int, int]:
    return state.stage_index, state.step
