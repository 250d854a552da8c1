"""What each stage of a recipe costs, counted on shapes: steps, FLOPs and memory."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from vlmix.models.configuration import VlmixConfig
from vlmix.models.flops import flop_counter
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.models.plan import forward_loss, parameter_count, shape_only, training_bytes
from vlmix.models.quantised import quantised_numbers
from vlmix.train.continual._tasks import Tasks
from vlmix.train.data_sets import planned_sizes
from vlmix.train.optimizers import OPTIMIZERS
from vlmix.train.recipe import Recipe, Stage
from vlmix.train.solo import select_for, solo_model
from vlmix.train.stages import stage_order
from vlmix.train.starting import check_starts
from vlmix.train.structure import reshape

_FLOAT32 = 4


@dataclass(frozen=True, slots=True)
class StageCost:
    """One stage. Bytes are for one process; ``steps`` is ``None`` where nothing tells the number of rows.

    ``notes`` say which data is absent, or has another number of rows than published, and how many rows of
    earlier tasks come again. ``method_bytes`` is what a continual method keeps beside the model: a teacher's
    weights, what others are held near to. A teacher's forward pass counts in the FLOPs.

    Weights, gradients and the optimizer's two moments are float32, as vlmix trains them (with Muon, which
    keeps one moment of a matrix, it is less; with 8 bits, a little more for what keeps 32), and averages of
    weights count with the optimizer; activations are in the stage's precision, for one micro-batch,
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
    method_bytes: int = 0

    @property
    def flops(self) -> int | None:
        """FLOPs of the whole stage, forward and backward."""
        return None if self.samples is None else self.samples * self.flops_per_sample


def stage_costs(recipe: Recipe, config: VlmixConfig, *, images: int, text_tokens: int) -> list[StageCost]:
    """The cost of each stage with ``images`` pictures and ``text_tokens`` tokens of text a sample.

    Raises:
        RecipeError: if a glob matches no parameter.
        PlanError: if a solo stage's projector does not fit its encoder, or adapters are where a stage puts
            experts.
        CheckpointError: if a run that a stage starts from has other experts.

    """
    check_starts(recipe)
    tasks, costs = Tasks.of(recipe), list[StageCost]()
    for index, stage in enumerate(recipe.stages):
        model = _in_stage(recipe, index, config)
        tasks.reshape(stage, model)
        cast("nn.Module", model).to(model.dtype)
        steps = _steps(recipe, index, tasks)
        costs.append(_cost(tasks.meant(stage, model), steps, model, images, text_tokens, tasks))
    return costs


def _in_stage(recipe: Recipe, index: int, config: VlmixConfig) -> VlmixForConditionalGeneration:
    """The model with the structure it has in a stage, as a run makes it: later mixtures are not in it yet."""
    stage, first = recipe.stages[index], copy.deepcopy(config)
    first.experts = [mixture.model_dump(mode="json") for mixture in recipe.model.experts] or None
    dtype = torch.bfloat16 if stage.precision == "bf16" else torch.float32
    model = shape_only(first, dtype)
    for earlier in recipe.stages[: index + 1]:
        reshape(earlier, model)
    cast("nn.Module", model).to(dtype)
    return model


@dataclass(frozen=True, slots=True)
class _Steps:
    count: int | None
    notes: tuple[str, ...]


def _steps(recipe: Recipe, index: int, tasks: Tasks) -> _Steps:
    stage = recipe.stages[index]
    sizes, notes = planned_sizes(stage)
    if sizes is None:
        return _Steps(stage.steps, tuple(notes))
    memories = tasks.memories(stage)
    order = stage_order(recipe, index, sizes, memories)
    tasks.counted(stage, sizes, order)
    again = (f"{len(memory.source):,} rows come again of {memory.name}" for memory in memories)
    return _Steps(order.steps, (*notes, *again))


def _cost(
    stage: Stage,
    steps: _Steps,
    whole: VlmixForConditionalGeneration,
    images: int,
    text_tokens: int,
    tasks: Tasks,
) -> StageCost:
    model, (in_4_bits, packed_bytes) = whole, quantised_numbers(whole)
    weights = parameter_count(whole) - in_4_bits
    if stage.solo is not None:
        dtype = whole.dtype
        model = solo_model(whole, stage.name, stage.solo)
        cast("nn.Module", model).to(dtype)
        weights += parameter_count(model.model.projector)
    model.train()
    select_for(stage, model)
    rows = stage.micro_batch_size or stage.batch_size
    activations = training_bytes(model, rows=rows, images=images, text_tokens=text_tokens)
    with flop_counter() as counter:
        forward_loss(model, rows=1, images=images, text_tokens=text_tokens).backward()
        if stage.task and tasks.method.asks_teacher:
            with torch.no_grad():
                forward_loss(model, rows=1, images=images, text_tokens=text_tokens)
    trainable = _trainable(model)
    return StageCost(
        name=stage.name,
        steps=steps.count,
        samples=None if steps.count is None else steps.count * stage.batch_size,
        visual_tokens=model.model.image_seq_length,
        trainable=trainable,
        flops_per_sample=int(counter.get_total_flops()),
        weight_bytes=weights * _FLOAT32 + packed_bytes,
        gradient_bytes=trainable * _FLOAT32,
        optimizer_bytes=trainable * _bytes_per_number(stage),
        activation_bytes=activations,
        notes=steps.notes,
        method_bytes=tasks.method.remembered(model) * _FLOAT32 if stage.task else 0,
    )


def _bytes_per_number(stage: Stage) -> int:
    moments = OPTIMIZERS.get(stage.optimizer["kind"]).bytes_per_number
    return moments + (_FLOAT32 if stage.ema is not None else 0)


def _trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
