"""A recipe, run in one folder: locked, written down, trained, and published as a model folder."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import cast

from rich.console import Console
from torch import nn

from vlmix.core.errors import CheckpointError, InputError
from vlmix.core.files import (
    LOCK,
    recover,
    run_lock,
    write_json,
)
from vlmix.models.loading import default_device
from vlmix.train.build import Setup, build, check_parts, load_setup, save_setup
from vlmix.train.checkpoint import (
    CHECKPOINTS,
    SETUP,
    Found,
    begin_random_state,
    newest,
    read_state,
    versions,
)
from vlmix.train.data_sets import check_present
from vlmix.train.dividing import build_divisible
from vlmix.train.finished import publish_model
from vlmix.train.interrupt import StopRequest
from vlmix.train.parallel.idle import idle_notes
from vlmix.train.parallel.processes import Processes, joined
from vlmix.train.recipe import Recipe
from vlmix.train.recipe_file import differences, load_recipe, write_recipe
from vlmix.train.stages import Stages

_RECIPE, _MODEL = "recipe.yaml", "model"
_FIRST = {SETUP, "versions.json", "resolved.json"}  # written before the recipe


def run_recipe(recipe: Recipe, out: Path, *, resume: bool = False, console: Console) -> Path:
    """Train what the recipe says in the folder ``out``, and return the folder of the finished model.

    With ``resume`` the run goes on from its newest whole checkpoint, from the beginning if there is none yet;
    on one process the weights come out bit for bit as if it had never stopped, wherever the machine gives
    the same result twice (CPUs do; some GPU kernels do not).

    Raises:
        InputError: if the recipe is wrong, data is missing, or ``out`` holds something and ``resume`` is not
            set.
        CheckpointError: if recipe or data changed since the run began, or no checkpoint is whole.
        RunLockedError: if another process uses ``out``.
        NonFiniteError: if a loss or gradient is not finite.
        DataError: if too many rows are bad.
        DiskFullError: if there is no room to save.
        InterruptedRunError: if a signal asked to stop; the run was saved.

    """
    check_parts(recipe)
    check_present(recipe)
    with joined(recipe.parallel) as team, ExitStack() as stack:
        told = console if team.is_main else Console(quiet=True)
        with team.together(f"opening {out}"):
            if team.is_main:
                stack.enter_context(run_lock(out))
            found = _resume_point(recipe, out, resume, told) if team.is_main else None
        found = _same_everywhere(found, team)
        with team.together("building the model"):
            setup = _set_up(recipe, out, found, team)
            stages = Stages.plan(recipe, out, setup, told, team)
            for note in idle_notes(recipe.stages, team.world):
                told.print(f"warning: {note}", markup=False, soft_wrap=True)
        with team.together(f"writing to {out}"):
            if found is None and team.is_main:
                _write_down(recipe, setup, out)
        if team.world == 1:
            cast("nn.Module", setup.model).to(default_device())
        with StopRequest() as stop:
            stages.run(found, stop)
        return publish_model(setup, out / _MODEL, team)


def _set_up(recipe: Recipe, out: Path, found: Found | None, team: Processes) -> Setup:
    """The model as it is when the run begins, or with shapes where each process will read its share."""
    if team.world == 1:
        return load_setup(out / SETUP, recipe.seed) if found else build(recipe)
    if found is not None:
        return load_setup(out / SETUP, None)
    setup = build_divisible(recipe)
    if not team.is_main:
        begin_random_state(str(recipe.seed), team.rank)
    return setup


def _same_everywhere(found: Found | None, team: Processes) -> Found | None:
    """What the first process found, on all."""
    folder = team.share(str(found.folder) if found else "")
    return found if team.is_main or not folder else Found(Path(folder), read_state(Path(folder)), ())


def _resume_point(recipe: Recipe, out: Path, resume: bool, console: Console) -> Found | None:
    """The checkpoint to go on from; ``None`` to begin."""
    recover(out)
    recover(out / CHECKPOINTS)
    contents = sorted(path.name for path in out.iterdir() if path.name != LOCK)
    # Killed while it was written down, before the recipe: such a run had not begun.
    if {*contents} <= _FIRST:
        return None
    if not resume:
        raise InputError(
            f"{out} already holds {', '.join(contents[:5])}: continue that run with --resume, or choose "
            "another --out"
        )
    if not (out / _RECIPE).is_file():
        raise InputError(f"{out} holds files but no {_RECIPE}: it is not a run. Choose another --out")
    if changed := differences(load_recipe(out / _RECIPE), recipe):
        raise CheckpointError(
            f"the recipe changed since the run in {out} began:\n  " + "\n  ".join(changed) + "\n"
            "Undo the change, or start again in another folder"
        )
    found = newest(out / CHECKPOINTS)
    for line in _warnings(found):
        console.print(f"warning: {line}", highlight=False, markup=False, soft_wrap=True)
    return found


def _warnings(found: Found | None) -> list[str]:
    if found is None:
        return []
    now = versions()
    changed = [
        f"{name} {old} -> {now.get(name)}"
        for name, old in found.state.versions.items()
        if now.get(name) != old
    ]
    damaged = [f"{problem}; going on from {found.folder.name}" for problem in found.problems]
    if changed:
        damaged.append(f"versions changed, so numbers may differ in their last bits: {', '.join(changed)}")
    return damaged


def _write_down(recipe: Recipe, setup: Setup, out: Path) -> None:
    """What the run is, before it begins; the recipe last, for a folder that has it is a run."""
    save_setup(setup, out / SETUP)
    write_json(out / "versions.json", versions())
    write_json(out / "resolved.json", recipe.model_dump(mode="json"))
    write_recipe(out / _RECIPE, recipe)
