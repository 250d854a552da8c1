"""What each stage of a recipe costs, counted on shapes: steps, FLOPs and memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vlmix.core.errors import InputError
from vlmix.models.configuration import VlmixConfig
from vlmix.models.plan import forward_loss, parameter_count, shape_only, training_bytes
from vlmix.train.build import open_sources
from vlmix.train.order import DataOrder
from vlmix.train.recipe import Recipe, Stage
from vlmix.train.stages import stage_order
from vlmix.train.trainable import select

_ADAMW_STATES = 2
_FLOAT32 = 4


@dataclass(frozen=True, slots=True)
class StageCost:
    """One stage. Bytes are for one process; ``steps`` is ``None`` where its data is not here to be counted.

    Weights, gradients and the optimizer's two moments are float32, as vlmix trains them (with Muon, which
    keeps one moment of a matrix, it is less); activations are in the stage's precision, for one micro-batch,
    without checkpointing.
    """

    name: str
    steps: int | None
    samples: int | None
    trainable: int
    flops_per_sample: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int

    @property
    def flops(self) -> int | None:
        """FLOPs of the whole stage, forward and backward."""
        return None if self.samples is None else self.samples * self.flops_per_sample


def stage_costs(recipe: Recipe, config: VlmixConfig, *, images: int, text_tokens: int) -> list[StageCost]:
    """The cost of each stage with ``images`` pictures and ``text_tokens`` tokens of text a sample.

    Raises:
        RecipeError: if a glob matches no parameter.

    """
    return [
        _cost(stage, _order(recipe, index), config, images, text_tokens)
        for index, stage in enumerate(recipe.stages)
    ]


def _order(recipe: Recipe, index: int) -> DataOrder | None:
    try:
        return stage_order(recipe, index, open_sources(recipe.stages[index]))
    except InputError:
        return None


def _cost(
    stage: Stage, order: DataOrder | None, config: VlmixConfig, images: int, text_tokens: int
) -> StageCost:
    dtype = torch.bfloat16 if stage.precision == "bf16" else torch.float32
    model = shape_only(config, dtype).train()
    select(model, stage.train)
    rows = stage.micro_batch_size or stage.batch_size
    activations = training_bytes(model, rows=rows, images=images, text_tokens=text_tokens)
    with FlopCounterMode(display=False) as counter:
        forward_loss(model, rows=1, images=images, text_tokens=text_tokens).backward()
    trainable = _trainable(model)
    steps = stage.steps or (order.steps if order else None)
    return StageCost(
        name=stage.name,
        steps=steps,
        samples=None if steps is None else steps * stage.batch_size,
        trainable=trainable,
        flops_per_sample=int(counter.get_total_flops()),
        weight_bytes=parameter_count(model) * _FLOAT32,
        gradient_bytes=trainable * _FLOAT32,
        optimizer_bytes=trainable * _FLOAT32 * _ADAMW_STATES,
        activation_bytes=activations,
    )


def _trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
