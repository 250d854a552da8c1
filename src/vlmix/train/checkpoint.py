"""Checkpoints: a folder of safetensors and JSON, published whole, found again by checking every byte.

Every process of a run writes what it holds; any number of processes can go on from that.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from vlmix import __version__
from vlmix.core.errors import CheckpointError, InputError
from vlmix.core.files import (
    MANIFEST,
    discard,
    read_json,
    sha256,
    verify_manifest,
    write_json,
    write_manifest,
)
from vlmix.core.settings import Settings, read_settings
from vlmix.train.optimizer_state import load_state, state_tensors
from vlmix.train.parallel.pieces import Stored, file_name, write, write_own
from vlmix.train.parallel.processes import Processes
from vlmix.train.parallel.publishing import publish_together

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
    root: Path,
    state: RunState,
    model: nn.Module,
    named: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
    processes: Processes | None = None,
    more: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Path:
    """Publish a checkpoint under ``root`` and remove those before the last two; all processes must ask.

    ``named`` gives the optimizer's parameters their names; ``more`` are further files by stem, which
    ``load_more`` reads.

    Raises:
        DiskFullError: if there is no room; the checkpoints there are intact.
        CheckpointError: if the optimizer's state cannot be divided as its parameters are.

    """
    team = processes or Processes()
    folder = root / f"{state.stage_index + 1}-{state.stage}-{state.step:07d}"
    before = [path for path, known in _candidates(root) if _place(known) < _place(state)]

    def fill(new: Path) -> Iterator[Path]:
        yield write(new, "model", unique_tensors(model), team.rank, team.world)
        yield write(new, "optimizer", state_tensors(named, optimizer), team.rank, team.world)
        yield write_own(new, "rng", _random_state(), team.rank, team.world)
        for stem, tensors in (more or {}).items():
            if tensors:
                yield write(new, stem, tensors, team.rank, team.world)

    def finish(new: Path) -> None:
        write_json(new / "state.json", state.model_dump())
        write_manifest(new, SCHEMA, parent=sha256(before[0] / MANIFEST) if before else "")

    publish_together(folder, team, fill, finish)
    if team.is_main:
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


def read_state(folder: Path) -> RunState:
    """Where the run stood when it wrote ``folder``.

    Raises:
        InputError: if that cannot be read.

    """
    return read_settings(RunState, read_json(folder / "state.json"))


def load_weights(folder: Path, model: nn.Module, *, converted: bool = False) -> None:
    """Copy a checkpoint's weights into ``model``, of which each process reads its own.

    They must have the model's types unless they may be ``converted``.

    Raises:
        CheckpointError: if a tensor is missing, left over or of another shape or type.

    """
    stored, wanted = Stored(folder, "model"), unique_tensors(model)
    _check_fit(stored, wanted, converted)
    with torch.no_grad():
        for name, tensor in wanted.items():
            stored.fill(name, tensor)


def load_optimizer(folder: Path, named: Mapping[str, nn.Parameter], optimizer: Optimizer) -> None:
    """Give the optimizer the state it had.

    Raises:
        CheckpointError: if the state is of parameters that do not train here.

    """
    load_state(Stored(folder, "optimizer"), named, optimizer)


def load_random_state(folder: Path, processes: Processes | None = None) -> None:
    """Give torch's generators the state they had.

    Every process has a stream of its own. Where another number of them goes on, the first keeps its stream
    and the others start new ones, drawn from what it is.
    """
    team = processes or Processes()
    mine = folder / file_name("rng", team.rank, team.world)
    first = next(iter(sorted(folder.glob("rng*.safetensors"))))
    if not mine.is_file() and not team.is_main:
        begin_random_state(sha256(first), team.rank)
        return
    states = load_file(mine if mine.is_file() else first)
    torch.set_rng_state(states["cpu"].clone())
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None and device.type in states:
        torch.get_device_module(device).set_rng_state(states[device.type].clone())


def load_more(folder: Path, stem: str) -> dict[str, Tensor]:
    """The tensors saved as ``more`` under ``stem``, whole; none where there were none."""
    if not any(folder.glob(f"{stem}*.safetensors")):
        return {}
    stored = Stored(folder, stem)
    return {name: stored.read(name) for name in sorted(stored.names)}


def fill_more(folder: Path, stem: str, tensors: Mapping[str, Tensor]) -> None:
    """Copy what was saved as ``more`` under ``stem`` into ``tensors``, of which each process reads its own.

    Raises:
        CheckpointError: if a tensor is missing, left over or of another shape or type.

    """
    stored = Stored(folder, stem)
    _check_fit(stored, tensors)
    for name, tensor in tensors.items():
        stored.fill(name, tensor)


def begin_random_state(seed: str, rank: int) -> None:
    """Begin the stream of process ``rank``: another one for each, the same whenever ``seed`` is."""
    key = [rank, *seed.encode()]
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name; tied ones once, under their first name."""
    seen: set[int] = set()
    result: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            result[name] = tensor
    return result


def _random_state() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None:
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


def _check_fit(stored: Stored, wanted: Mapping[str, Tensor], converted: bool = False) -> None:
    missing, extra = sorted(wanted.keys() - stored.names), sorted(stored.names - wanted.keys())
    if missing or extra:
        raise CheckpointError(
            f"{stored.folder} does not fit this model: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(extra)} left over {extra[:3]}"
        )
    for name, tensor in wanted.items():
        shape, dtype = stored.shape(name), stored.dtype(name)
        if shape != tuple(tensor.shape) or (dtype != tensor.dtype and not converted):
            raise CheckpointError(
                f"{stored.folder}: {name} is {dtype} {shape}, here {tensor.dtype} {tuple(tensor.shape)}"
            )


def _candidates(root: Path, problems: list[str] | None = None) -> list[tuple[Path, RunState]]:
    """Checkpoint folders with a readable state, newest first; the others' faults go to ``problems``."""
    found: list[tuple[Path, RunState]] = []
    for folder in sorted(root.glob("[!.]*")):
        try:
            found.append((folder, read_state(folder)))
        except (InputError, TypeError, ValueError) as error:
            if problems is not None:
                problems.append(f"{folder}: {error}")
    return sorted(found, key=lambda item: _place(item[1]), reverse=True)


def _place(state: RunState) -> tuple[int, int]:
    return state.stage_index, state.step
