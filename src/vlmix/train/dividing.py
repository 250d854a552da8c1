"""A stage's model on several processes: made anew when the stage begins, divided, and read by slices."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from vlmix.models.configuration import VlmixConfig
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.train.build import Setup, build, build_processor, load_setup, new_model
from vlmix.train.checkpoint import SETUP, load_weights
from vlmix.train.handing_on import hand_on, load_folder
from vlmix.train.parallel.memory import compute_buffers, give_memory
from vlmix.train.parallel.processes import Processes
from vlmix.train.recipe import Recipe, Stage
from vlmix.train.solo import Running, select_for
from vlmix.train.structure import reshape


def build_divisible(recipe: Recipe) -> Setup:
    """``build``, with shapes alone where weights are taken from a folder by slices.

    Those are all where the first stage starts from a folder, and else the decoder's.
    """
    processor, config = build_processor(recipe)
    if recipe.model.experts or recipe.model.adapters or not _starts_by_slices(recipe.stages[0], config):
        first = recipe.stages[0]
        return build(recipe, decoder_by_slices=not first.before and first.start_from == "previous")
    return Setup(new_model(config, processor, None), processor)


def renew(
    setup: Setup, stages: Sequence[Stage], out: Path, team: Processes
) -> VlmixForConditionalGeneration | None:
    """On several processes, an undivided model for the last of ``stages``, as it is before that stage.

    Returns the model that was trained so far. Its weights are in the new one already where the stage changes
    them, and otherwise still to be handed on by ``divide``. Random numbers go on as if nothing had happened.
    """
    *before, stage = stages
    if not before or team.world == 1:
        return None
    trained = setup.model
    with torch.random.fork_rng():
        setup.model = load_setup(out / SETUP, None).model
        for earlier in before:
            reshape(earlier, setup.model)
        config = setup.model.config
        if stage.before or (stage.start_from != "previous" and not _starts_by_slices(stage, config)):
            give_memory(setup.model, torch.device("cpu"))
            hand_on(trained, setup.model)
            compute_buffers(setup.model)
    return trained


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
    setup: Setup,
    stage: Stage,
    ran: Running,
    team: Processes,
    source: VlmixForConditionalGeneration | Path | None,
    *,
    looks_ahead: bool,
) -> None:
    """Give each process its share of the model; what has shapes alone is filled from ``source``.

    That is a checkpoint of the stage, or the model trained so far, unless the stage starts from a folder.
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
    if isinstance(source, Path):
        load_weights(source, ran.kept)
    elif stage.start_from != "previous":
        load_folder(Path(stage.start_from), setup.model)
    elif source is not None:
        hand_on(source, setup.model)
    elif setup.published is not None:
        setup.published.fill(setup.model.model.language_model)
    compute_buffers(setup.model)


def has_shapes_alone(model: nn.Module) -> bool:
    """Whether no process has its weights yet, or not those of the decoder."""
    return any(parameter.is_meta for parameter in model.parameters())


def _starts_by_slices(stage: Stage, config: VlmixConfig) -> bool:
    """Whether the folder that a stage starts from has the tensors it trains, under their names."""
    folder = Path(stage.start_from)
    if stage.start_from == "previous" or stage.before or not (folder / "config.json").is_file():
        return False
    theirs = VlmixConfig.from_pretrained(folder, local_files_only=True)
    return theirs.adapters == config.adapters and theirs.experts == config.experts
