"""A stage's model on several processes: made anew when the stage begins, divided, and read by slices."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from vlmix.core.errors import CheckpointError, RecipeError
from vlmix.models.configuration import VlmixConfig
from vlmix.train.build import Setup, build, build_processor, load_setup, new_model
from vlmix.train.checkpoint import CHECKPOINTS, SETUP, load_weights, newest_unchecked
from vlmix.train.parallel.memory import compute_buffers, give_memory
from vlmix.train.parallel.processes import Processes
from vlmix.train.recipe import Recipe, Stage
from vlmix.train.solo import Running, select_for
from vlmix.train.structure import reshape


def check_divisible(recipe: Recipe) -> None:
    """Refuse what only one process can do.

    Raises:
        RecipeError: naming it.

    """
    alone = [f"stage {stage.name} is `solo`" for stage in recipe.stages if stage.solo is not None]
    alone += ["it is `continual`"] if recipe.continual is not None else []
    if alone:
        raise RecipeError(f"{alone[0]}, which only one process can run: start it without torchrun")


def build_divisible(recipe: Recipe) -> Setup:
    """``build``, with shapes alone where the first stage takes all weights from a folder by slices."""
    processor, config = build_processor(recipe)
    if recipe.model.experts or recipe.model.adapters or not _starts_by_slices(recipe.stages[0], config):
        return build(recipe)
    return Setup(new_model(config, processor, None), processor)


def renew(setup: Setup, stages: Sequence[Stage], out: Path, team: Processes) -> None:
    """On several processes, an undivided model for the last of ``stages``, as it is before that stage.

    Its weights are those of the newest checkpoint where the stage changes them, and still to be read where
    each process may read its own share. Random numbers go on as if nothing had happened.
    """
    *before, stage = stages
    if not before or team.world == 1:
        return
    with torch.random.fork_rng():
        setup.model = load_setup(out / SETUP, None).model
        for earlier in before:
            reshape(earlier, setup.model)
        config = setup.model.config
        if stage.before or (stage.start_from != "previous" and not _starts_by_slices(stage, config)):
            give_memory(setup.model, torch.device("cpu"))
            load_weights(_newest(out), setup.model)
            compute_buffers(setup.model)


@contextmanager
def same_draws(team: Processes) -> Generator[None]:
    """Within the block every process draws what the first one does; then it goes on with its own stream."""
    state = torch.get_rng_state()
    text = team.share(state.numpy().tobytes().hex() if team.is_main else "")
    if team.is_main:
        yield
        return
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8))
    try:
        yield
    finally:
        torch.set_rng_state(state)


def divide(
    setup: Setup, stage: Stage, ran: Running, team: Processes, source: Path, *, looks_ahead: bool
) -> None:
    """Give each process its share of the model; what has shapes alone is read from ``source``.

    ``source`` is a checkpoint, or a run's folder for its newest one or what the stage starts from.
    Encoders that look ahead of the model, without the others' help, stay whole.
    """
    if team.world == 1:
        return
    select_for(stage, ran.model)
    inner = ran.model.model
    team.prepare(ran.model, stage.precision, (inner.encoders,) if looks_ahead else ())
    if not has_shapes_alone(setup.model):
        return
    give_memory(ran.kept, team.device, team.memory)
    if (source / "state.json").is_file():
        load_weights(source, ran.kept)
    elif stage.start_from != "previous":
        load_weights(Path(stage.start_from), ran.kept, converted=True)
    else:
        load_weights(_newest(source), ran.kept)
    compute_buffers(setup.model)


def has_shapes_alone(model: nn.Module) -> bool:
    """Whether no process has its weights yet."""
    return next(model.parameters()).is_meta


def _starts_by_slices(stage: Stage, config: VlmixConfig) -> bool:
    """Whether the folder that a stage starts from has the tensors it trains, under their names."""
    folder = Path(stage.start_from)
    if stage.start_from == "previous" or stage.before or not (folder / "config.json").is_file():
        return False
    theirs = VlmixConfig.from_pretrained(folder, local_files_only=True)
    return theirs.adapters == config.adapters and theirs.experts == config.experts


def _newest(out: Path) -> Path:
    """The checkpoint that this run wrote last; it was checked when it was found or written."""
    found = newest_unchecked(out / CHECKPOINTS)
    if found is None:
        raise CheckpointError(f"{out} has no checkpoint although a stage has ended: go on with --resume")
    return found
