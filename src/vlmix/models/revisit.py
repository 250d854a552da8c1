"""Fusions that go on inside the decoder: behind some of its layers they see the visual tokens again.

What they need travels with the decoder's own arguments, not in the module: a layer that is run once more for
its gradients finds what it had the first time, and the steps that write an answer find nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmix.core.errors import PlanError
from vlmix.core.interfaces import Fusion

REVISIT: Final = "revisit"


@dataclass(frozen=True)
class Revisit:
    """One batch's visual tokens: where they stand, which cells they are, and what the fusion remembers.

    ``is_image`` (B, T) is true of placeholders; ``order`` (N,) is as in ``Viewing.order``.
    """

    fusion: Fusion
    memory: Any
    is_image: Tensor
    order: Tensor | None

    def apply(self, place: int, hidden_BTD: Tensor) -> Tensor:
        """The decoder's states with the visual tokens refined; ends of rows stay as they are."""
        tokens_ND = hidden_BTD[self.is_image]
        if self.order is None:
            refined_ND = self.fusion.refine(place, tokens_ND, self.memory, None)
        else:
            is_cell_N = self.order >= 0
            found = self.fusion.refine(place, tokens_ND[is_cell_N], self.memory, self.order[is_cell_N])
            refined_ND = tokens_ND.masked_scatter(is_cell_N.unsqueeze(-1), found.to(tokens_ND))
        return hidden_BTD.masked_scatter(self.is_image.unsqueeze(-1), refined_ND.to(hidden_BTD))


def revisit_layers(decoder: PreTrainedModel, places: Sequence[int]) -> None:
    """Let the fusion refine visual tokens behind these layers of the decoder.

    Raises:
        PlanError: if the decoder has no such layer.

    """
    layers = dict(decoder.named_children()).get("layers")
    for place, index in enumerate(places):
        if not isinstance(layers, nn.ModuleList) or index >= len(layers):
            count = len(layers) if isinstance(layers, nn.ModuleList) else "no"
            raise PlanError(
                f"fusion: there is no decoder layer {index}; {type(decoder).__name__} has {count}"
            )
        layers[index].register_forward_hook(_hook(place), with_kwargs=True)


def _hook(place: int) -> Callable[[nn.Module, Any, dict[str, Any], Any], Any]:
    def refine(_: nn.Module, __: Any, arguments: dict[str, Any], output: Any) -> Any:
        again = cast("Revisit | None", arguments.get(REVISIT))
        if again is None:
            return output
        if isinstance(output, torch.Tensor):
            return again.apply(place, output)
        return (again.apply(place, output[0]), *output[1:])

    return refine
