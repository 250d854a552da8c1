"""Which answers of a batch might be others in another batch: those that were chosen by a hair.

Rows of a batch are added up in an order that depends on the batch, so scores differ in their last bits from
those of the same question asked alone. The likeliest token is the same wherever it leads by more than that.
A row that ever led by less, in a token or in the choice of an expert, is told, and is asked again alone.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import Tensor
from transformers import LogitsProcessor

from vlmix.core.interfaces import Router
from vlmix.core.tensors import Routing

if TYPE_CHECKING:
    from vlmix.models.modeling import VlmixForConditionalGeneration

_SHARE: Final = {torch.float32: 1e-4, torch.float16: 1.25e-2, torch.bfloat16: 1e-1}
"""What a lead must be more than, as a share of a row's largest score (see docs/systems/evaluation.md)."""
_CHOICE_SHARE: Final = 0.1
"""Choices of experts are many and lie early in the network: they may lead by a tenth of that."""
_REPEATING: Final[ContextVar[bool]] = ContextVar("repeating", default=False)


@contextmanager
def repeating() -> Generator[None]:
    """What runs inside the ``with`` was asked before: whoever counts forward passes leaves it out."""
    token = _REPEATING.set(True)
    try:
        yield
    finally:
        _REPEATING.reset(token)


@contextmanager
def one_thread(device: torch.device) -> Generator[None]:
    """Add up in one order on a processor, however many threads others were given."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def is_repeated() -> bool:
    """Whether what runs was asked before."""
    return _REPEATING.get()


def stands_alone(model: VlmixForConditionalGeneration) -> bool:
    """Whether questions must be asked one at a time: the rows of a batch compete for experts."""
    return any(isinstance(module, Router) and not module.rowwise for module in model.modules())


class Ties(LogitsProcessor):
    """Watches ``generate`` greedily answer ``rows`` questions; ``close`` (B,) says which led by a hair.

    Pass it as a logits processor, within ``watching``. Scores are left as they are.
    """

    def __init__(self, model: VlmixForConditionalGeneration, rows: int, stops: list[int]) -> None:
        self._model, self._stops = model, torch.tensor(stops, device=model.device)
        self._share = _SHARE[model.dtype]
        self.close = torch.zeros(rows, dtype=torch.bool, device=model.device)
        self._over = torch.zeros_like(self.close)
        self._begun = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Note the lead of each row's likeliest token; ``scores`` (B, V) pass unchanged."""
        if self._begun:
            self._over |= torch.isin(input_ids[:, -1], self._stops)
        self._begun = True
        first_B, second_B = scores.topk(2).values.unbind(-1)
        bound_B = scores.masked_fill(~scores.isfinite(), 0).abs().amax(-1) * self._share
        self.close |= (first_B - second_B <= bound_B) & ~self._over
        return scores

    @contextmanager
    def watching(self) -> Generator[None]:
        """Look at the choices of experts too, where the model has any."""
        if not any(isinstance(module, Router) for module in self._model.modules()):
            yield
            return
        handle = self._model.register_forward_hook(self._saw, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _saw(self, module: Any, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        ids_BT, mask_BT = kwargs["input_ids"], kwargs.get("attention_mask")
        hidden = mask_BT is not None and mask_BT.shape == ids_BT.shape
        read_BT = cast("Tensor", mask_BT).bool() if hidden else torch.ones_like(ids_BT, dtype=torch.bool)
        for routing in cast("tuple[Routing, ...]", output.routing or ()):
            close_RT = self._chosen_by_a_hair(routing)
            if close_RT.shape == read_BT.shape:
                self.close |= (close_RT & read_BT).any(-1) & ~self._over
            elif len(close_RT) == len(self.close):
                self.close |= close_RT.any(-1) & ~self._over
            elif close_RT.any():  # of pictures, which are not rows of the batch
                self.close |= ~self._over

    def _chosen_by_a_hair(self, routing: Routing) -> Tensor:
        """(rows of the batch, decisions in each): the chosen experts hardly lead in score, or do not."""
        if routing.mixing is not None:
            return torch.zeros(routing.shape, dtype=torch.bool, device=routing.logits.device)
        if routing.rows is not None:
            return torch.ones(routing.shape, dtype=torch.bool, device=routing.logits.device)
        scores_TE = routing.logits.float()
        chosen_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(1, routing.indices, True)
        lead_T = scores_TE.masked_fill(~chosen_TE, torch.inf).amin(-1)
        lead_T = lead_T - scores_TE.masked_fill(chosen_TE, -torch.inf).amax(-1)
        bound_T = scores_TE.abs().amax(-1) * self._share * _CHOICE_SHARE
        return (lead_T <= bound_T).view(routing.shape)
