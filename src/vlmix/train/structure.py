"""What a stage makes of the model before it begins: other parts, other weights."""

from __future__ import annotations

import copy
from typing import Any

import torch

from vlmix.core.errors import CheckpointError
from vlmix.core.parts import read_part
from vlmix.models.adapters import bare, merged_tensors, reset_adapters
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.models.plan import shape_only
from vlmix.moe.install import expert_layers
from vlmix.train.build import Setup
from vlmix.train.continual._tasks import Tasks
from vlmix.train.recipe import Recipe, Stage
from vlmix.train.transforms import TRANSFORMS
from vlmix.train.transforms._base import Transform


def transform(raw: dict[str, Any]) -> Transform:
    """The transform that ``{"kind": …}`` describes."""
    return TRANSFORMS.get(raw["kind"])(read_part(TRANSFORMS, raw))


def shapes_of(recipe: Recipe, setup: Setup, tasks: Tasks) -> VlmixForConditionalGeneration | None:
    """The model with shapes alone, where stages change its structure; they are checked on it."""
    kinds = {raw["kind"] for stage in recipe.stages for raw in stage.before}
    changes = any(TRANSFORMS.get(kind).reshape is not Transform.reshape for kind in kinds)
    if not changes and not any(map(tasks.reshapes, recipe.stages)):
        return None
    return shape_only(copy.deepcopy(setup.model.config), torch.float32)


def reshape(stage: Stage, model: VlmixForConditionalGeneration) -> None:
    """Give ``model`` the structure it has in ``stage``.

    Raises:
        PlanError: if it cannot have that structure.

    """
    for raw in stage.before:
        transform(raw).reshape(model)


def load_model_weights(model: VlmixForConditionalGeneration, folder: str) -> None:
    """Copy the weights of a model folder into ``model``.

    Where the two have different adapters, the folder's are merged into its weights and those of ``model``
    start anew.

    Raises:
        CheckpointError: if it is another kind of model, has other experts, or a tensor does not fit.

    """
    other = VlmixForConditionalGeneration.from_pretrained(folder, local_files_only=True)
    theirs, tensors = other.config.adapter_settings(), other.state_dict()
    _check_experts(other, model, folder)
    try:
        if theirs == model.config.adapter_settings():
            model.load_state_dict(tensors)
            return
        with bare(model):
            model.load_state_dict(merged_tensors(tensors, theirs))
        reset_adapters(model)
    except RuntimeError as error:
        raise CheckpointError(f"start_from: the weights of {folder} do not fit: {error}") from None


def _check_experts(
    other: VlmixForConditionalGeneration, model: VlmixForConditionalGeneration, folder: str
) -> None:
    theirs, ours = ({layer.name: layer.router_experts for layer in expert_layers(m)} for m in (other, model))
    if theirs != ours:
        raise CheckpointError(
            f"start_from: {folder} has {len(theirs)} layers of experts, and the model of this stage, so far, "
            f"{len(ours)}; places and numbers of experts must be the same. Where the folder is dense, take "
            "the mixture out of `model.experts` and put it into this stage, `before: [{kind: upcycle, …}]`, "
            "which comes after start_from; else give the recipe the folder's mixtures in `model.experts`"
        )
