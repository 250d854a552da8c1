"""Fresh random weights for the parameters that globs name, such as a new projector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

import torch
from pydantic import Field
from torch import nn
from transformers import PreTrainedModel

from vlmix.core.errors import RecipeError
from vlmix.core.settings import PartSettings
from vlmix.train.trainable import matching
from vlmix.train.transforms import TRANSFORMS
from vlmix.train.transforms._base import Transform

_DONE = "_is_hf_initialized"


class ReinitialiseSettings(PartSettings):
    """``parameters`` are globs over names as in a stage's ``train``."""

    kind: Literal["reinitialise"] = "reinitialise"  # pyright: ignore[reportIncompatibleVariableOverride]
    parameters: Annotated[list[str], Field(min_length=1)]

    @classmethod
    def tiny(cls) -> Self:
        """The projector."""
        return cls(parameters=["projector.*"])


@TRANSFORMS.register("reinitialise")
class Reinitialise(Transform):
    """Draws fresh weights with the model's own initialisation, as for weights missing from a checkpoint."""

    settings_class = ReinitialiseSettings
    settings: ReinitialiseSettings

    def apply(self, model: PreTrainedModel) -> str:
        """Redraw the matched parameters; everything else keeps its bits."""
        chosen = matching(model, self.settings.parameters, "before.parameters")
        redraw(model, chosen, "before.parameters")
        return f"fresh weights: {len(chosen)} tensors of {', '.join(self.settings.parameters)}"


def redraw(model: PreTrainedModel, chosen: Mapping[str, nn.Parameter], where: str) -> None:
    """Give the parameters of ``model`` in ``chosen`` fresh values from torch's own generator.

    Raises:
        RecipeError: if nothing in the model initialises one of them; starts with ``where``.

    """
    tensors = [*model.parameters(), *model.buffers()]
    with torch.no_grad():
        for parameter in chosen.values():
            parameter.fill_(torch.nan)
    # transformers initialises what is not marked as done: the mechanism it uses for missing weights.
    _mark(model, {id(parameter) for parameter in chosen.values()})
    model.initialize_weights()
    for tensor in tensors:
        tensor.__dict__.pop(_DONE, None)
    if untouched := [name for name, value in chosen.items() if not bool(value.isfinite().all())]:
        raise RecipeError(f"{where}: nothing in the model says how to initialise {untouched[0]!r}")


def _mark(model: nn.Module, fresh: set[int]) -> None:
    for tensor in [*model.parameters(), *model.buffers()]:
        setattr(tensor, _DONE, id(tensor) not in fresh)
    for module in model.modules():
        setattr(module, _DONE, not any(id(parameter) in fresh for parameter in module.parameters()))
