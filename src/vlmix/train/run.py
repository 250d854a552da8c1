"""A recipe, run in one folder: locked, written down, trained, and published as a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from rich.console import Console
from torch import nn

from vlmix.core.errors import CheckpointError, InputError
from vlmix.core.files import (
    LOCK,
    publish,
    recover,
    run_lock,
    verify_manifest,
    write_json,
    write_manifest,
)
from vlmix.models.loading import default_device, no_bars
from vlmix.train.build import Setup, build, check_parts, load_setup, save_setup
from vlmix.train.checkpoint import CHECKPOINTS, SETUP, Found, newest, versions
from vlmix.train.data_sets import check_present
from vlmix.train.interrupt import StopRequest
from vlmix.train.recipe import Recipe
from vlmix.train.recipe_file import differences, load_recipe, write_recipe
from vlmix.train.stages import Stages

MODEL_SCHEMA = "vlmix.model/1"
_RECIPE, _MODEL = "recipe.yaml", "model"


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
    with run_lock(out):
        found = _resume_point(recipe, out, resume, console)
        setup = load_setup(out / SETUP, recipe.seed) if found else build(recipe)
        stages = Stages.plan(recipe, out, setup, console)
        if found is None:
            _write_down(recipe, setup, out)
        cast("nn.Module", setup.model).to(default_device())
        with StopRequest() as stop:
            stages.run(found, stop)
        return _publish_model(setup, out / _MODEL)


def _resume_point(recipe: Recipe, out: Path, resume: bool, console: Console) -> Found | None:
    """The checkpoint to go on from; ``None`` to begin."""
    recover(out)
    recover(out / CHECKPOINTS)
    contents = sorted(path.name for path in out.iterdir() if path.name != LOCK)
    if not contents:
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


def _publish_model(setup: Setup, folder: Path) -> Path:
    """An ordinary transformers folder with the finished model and its processor."""
    setup.model.eval()
    with publish(folder) as new, no_bars():
        setup.model.save_pretrained(new)
        setup.processor.save_pretrained(new)
        write_manifest(new, MODEL_SCHEMA)
    verify_manifest(folder, MODEL_SCHEMA)
    return folder
