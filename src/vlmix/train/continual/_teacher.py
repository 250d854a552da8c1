"""The model as it was before a task, frozen: what distillation learns from."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.train.continual._base import Batch, supervised_logits, trained

_NAME = "teacher."


class Teacher:
    """A copy that shares what the task leaves frozen; a checkpoint holds the rest of it.

    Where ``model`` is in the middle of a task, ``weights`` are what it had before.
    """

    def __init__(
        self, model: VlmixForConditionalGeneration, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        self._own = list(trained(model))
        shared = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
        self.model = copy.deepcopy(model, shared).eval().requires_grad_(False)
        # Only the copy's own: the flags of what is shared are as they were.
        if weights is not None:
            own = dict(self.model.named_parameters())
            with torch.no_grad():
                for name in self._own:
                    own[name].copy_(weights[_NAME + name])

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """The logits it gives for the supervised tokens of ``batch``: (N, V)."""
        labels_BT = batch["labels"]
        output = self.model(**batch, logits_to_keep="supervised", use_cache=False)
        return supervised_logits(output, labels_BT)

    def state(self) -> dict[str, Tensor]:
        """The weights that the task changes in the model, as they were."""
        own = dict(self.model.named_parameters())
        return {_NAME + name: own[name].detach() for name in self._own}


def stored_teacher(state: Mapping[str, Tensor], model: VlmixForConditionalGeneration) -> Teacher | None:
    """The teacher a checkpoint holds; ``None`` where it was saved between tasks."""
    return Teacher(model, state) if any(name.startswith(_NAME) for name in state) else None
