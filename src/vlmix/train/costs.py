"""What each stage of a recipe costs, counted on shapes: steps, FLOPs and memory."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from vlmix.models.configuration import VlmixConfig
from vlmix.models.flops import flop_counter
from vlmix.models.plan import forward_loss, parameter_count, shape_only, training_bytes
from vlmix.train.build import mixtures_of
from vlmix.train.data_sets import planned_sizes
from vlmix.train.recipe import Recipe, Stage
from vlmix.train.solo import select_for, solo_model
from vlmix.train.stages import stage_order

_ADAMW_STATES = 2
_FLOAT32 = 4


@dataclass(frozen=True, slots=True)
class StageCost:
    """One stage. Bytes are for one process; ``steps`` is ``None`` where nothing tells the number of rows.

    ``notes`` say which data is absent, or has another number of rows than published.

    Weights, gradients and the optimizer's two moments are float32, as vlmix trains them (with Muon, which
    keeps one moment of a matrix, it is less); activations are in the stage's precision, for one micro-batch,
    without checkpointing. A solo stage runs one encoder, but the weights of the others are held all the same.
    """

    name: str
    steps: int | None
    samples: int | None
    visual_tokens: int
    trainable: int
    flops_per_sample: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def flops(self) -> int | None:
        """FLOPs of the whole stage, forward and backward."""
        return None if self.samples is None else self.samples * self.flops_per_sample


def stage_costs(recipe: Recipe, config: VlmixConfig, *, images: int, text_tokens: int) -> list[StageCost]:
    """The cost of each stage with ``images`` pictures and ``text_tokens`` tokens of text a sample.

    Raises:
        RecipeError: if a glob matches no parameter.
        PlanError: if a solo stage's projector does not fit its encoder.

    """
    return [
        _cost(stage, _steps(recipe, index), _in_stage(recipe, index, config), images, text_tokens)
        for index, stage in enumerate(recipe.stages)
    ]


def _in_stage(recipe: Recipe, index: int, config: VlmixConfig) -> VlmixConfig:
    """The model's configuration with the mixtures it has in a stage: later ones are not in it yet."""
    until = recipe.model_copy(update={"stages": recipe.stages[: index + 1]})
    mixtures = mixtures_of(until)
    found = copy.deepcopy(config)
    found.experts = [mixture.model_dump(mode="json") for mixture in mixtures] or None
    return found


@dataclass(frozen=True, slots=True)
class _Steps:
    count: int | None
    notes: tuple[str, ...]


def _steps(recipe: Recipe, index: int) -> _Steps:
    stage = recipe.stages[index]
    sizes, notes = planned_sizes(stage)
    steps = stage.steps if sizes is None else stage_order(recipe, index, sizes).steps
    return _Steps(steps, tuple(notes))


def _cost(stage: Stage, steps: _Steps, config: VlmixConfig, images: int, text_tokens: int) -> StageCost:
    dtype = torch.bfloat16 if stage.precision == "bf16" else torch.float32
    whole = model = shape_only(config, dtype)
    weights = parameter_count(whole)
    if stage.solo is not None:
        model = solo_model(whole, stage.name, stage.solo)
        cast("nn.Module", model).to(dtype)
        weights += parameter_count(model.model.projector)
    model.train()
    select_for(stage, model)
    rows = stage.micro_batch_size or stage.batch_size
    activations = training_bytes(model, rows=rows, images=images, text_tokens=text_tokens)
    with flop_counter() as counter:
        forward_loss(model, rows=1, images=images, text_tokens=text_tokens).backward()
    trainable = _trainable(model)
    return StageCost(
        name=stage.name,
        steps=steps.count,
        samples=None if steps.count is None else steps.count * stage.batch_size,
        visual_tokens=model.model.image_seq_length,
        trainable=trainable,
        flops_per_sample=int(counter.get_total_flops()),
        weight_bytes=weights * _FLOAT32,
        gradient_bytes=trainable * _FLOAT32,
        optimizer_bytes=trainable * _FLOAT32 * _ADAMW_STATES,
        activation_bytes=activations,
        notes=steps.notes,
    )


def _trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
