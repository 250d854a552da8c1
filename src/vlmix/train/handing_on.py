"""From one stage to the next on several processes: each gives what it holds to a model divided anew."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from vlmix.models.adapters import bare
from vlmix.models.configuration import VlmixConfig
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.train.checkpoint import load_weights, unique_tensors
from vlmix.train.parallel.pieces import extent_of, local
from vlmix.train.parallel.sharding import whole


@torch.no_grad()
def hand_on(before: VlmixForConditionalGeneration, model: VlmixForConditionalGeneration) -> None:
    """Fill ``model`` with the weights of ``before``, tensor by tensor; all processes must ask.

    Adapters that only ``model`` has are left as they are, and what stands below them is filled.
    """
    before.zero_grad(set_to_none=True)
    theirs = before.state_dict(keep_vars=True)
    new = before.config.adapters != model.config.adapters
    with bare(model) if new else nullcontext():
        for name, tensor in unique_tensors(model).items():
            local(tensor.detach()).copy_(_part(theirs[name].detach(), tensor))


def load_folder(folder: Path, model: VlmixForConditionalGeneration) -> None:
    """Fill ``model`` with the weights of a vlmix folder, of which each process reads its own.

    Raises:
        CheckpointError: if a tensor is missing, left over or of another shape.

    """
    theirs = VlmixConfig.from_pretrained(folder, local_files_only=True).adapters
    with bare(model) if theirs != model.config.adapters else nullcontext():
        load_weights(folder, model, converted=True)


def _part(theirs: Tensor, like: Tensor) -> Tensor:
    """What this process holds of ``theirs`` where it is divided as ``like`` is."""
    if isinstance(theirs, DTensor) and isinstance(like, DTensor) and theirs.placements == like.placements:
        return theirs.to_local()
    extent, gathered = extent_of(like), whole(theirs)
    return gathered[tuple(slice(at, at + n) for at, n in zip(extent.start, extent.size, strict=True))]
