"""What a forward pass costs: cross entropy of the next token over the positions that were kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

IGNORED = -100
# Logits that exist at one time in the fused loss: no more than keeps matrix products efficient.
_CELLS: Final = {"cpu": 1 << 22}
_CELLS_ELSEWHERE: Final = 1 << 24


def supervised_positions(labels: Tensor | None) -> Tensor:
    """Positions whose next token is a label in at least one row, and the last one if there is none."""
    if labels is None:
        raise ValueError("logits_to_keep='supervised' needs labels")
    kept = (labels[:, 1:] != IGNORED).any(0).nonzero().squeeze(1)
    return kept if kept.numel() else torch.tensor([labels.shape[1] - 1], device=labels.device)


def supervised_share(labels_BT: Tensor, items: Tensor | int | None) -> Tensor | float:
    """The share of a step's supervised tokens, ``items`` of them, that this micro-batch has."""
    return 1.0 if items is None else (labels_BT[:, 1:] != IGNORED).sum() / items


def next_token_loss(
    logits_BKV: Tensor, labels_BT: Tensor, kept: int | Tensor, items: Tensor | int | None
) -> Tensor:
    """Cross entropy of each kept position with the label after it, in float32, divided by ``items``."""
    after_BT = _after(labels_BT)
    if isinstance(kept, Tensor):
        after_BT = after_BT[:, kept]
    elif kept:
        after_BT = after_BT[:, -kept:]
    total = F.cross_entropy(
        logits_BKV.float().flatten(0, 1), after_BT.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / ((after_BT != IGNORED).sum() if items is None else items)


def fused_next_token_loss(
    states_BTD: Tensor, head: nn.Linear, labels_BT: Tensor, items: Tensor | int | None
) -> Tensor:
    """The same from the states that a plain ``head`` reads; all logits never exist at one time."""
    after_BT = _after(labels_BT)
    learnt_BT = after_BT != IGNORED
    x_ND, weight_VD, bias_V = states_BTD[learnt_BT], head.weight, head.bias
    device = x_ND.device.type
    if torch.is_autocast_enabled(device):  # as the head itself would compute
        kind = torch.get_autocast_dtype(device)
        x_ND, weight_VD = x_ND.to(kind), weight_VD.to(kind)
        bias_V = None if bias_V is None else bias_V.to(kind)
    total = cast("Tensor", _LinearCrossEntropy.apply(x_ND, weight_VD, bias_V, after_BT[learnt_BT]))
    return total / (learnt_BT.sum() if items is None else items)


def answer_loss(
    out: ModelOutput,
    head: nn.Module,
    labels_BT: Tensor,
    told: Mapping[str, int | Tensor],
    items: Tensor | int | None,
) -> Tensor:
    """The loss of a decoder's output: from the logits that its head was ``told`` to make, or else fused."""
    if out.get("logits") is None:
        return fused_next_token_loss(out["last_hidden_state"], cast("nn.Linear", head), labels_BT, items)
    return next_token_loss(out["logits"], labels_BT, told["logits_to_keep"], items)


@torch.no_grad()
def has_plain_head(language_model: PreTrainedModel) -> bool:
    """Whether logits are what one Linear makes of the trunk's last hidden state, and nothing else.

    Tried with states so large that a cap, a scale or a norm on the way would show.
    """
    head, trunk = language_model.get_output_embeddings(), language_model.base_model
    if type(head) is not nn.Linear or trunk is language_model:
        return False
    generator = torch.Generator().manual_seed(0)
    place = {"device": head.weight.device, "dtype": head.weight.dtype}
    large_11D = 1e3 * torch.randn(1, 1, head.in_features, generator=generator).to(**place)

    def exchange(_: nn.Module, __: Any, output: Any) -> Any:
        output["last_hidden_state"] = large_11D
        return output

    handle = trunk.register_forward_hook(exchange)
    try:
        embeds_11D = torch.zeros(1, 1, language_model.config.hidden_size, **place)
        found_11V = language_model(inputs_embeds=embeds_11D, use_cache=False).logits
    finally:
        handle.remove()
    expected_11V = head(large_11D)
    if found_11V.shape != expected_11V.shape:
        return False
    # The same product of the same numbers, but perhaps cast on its way.
    far = (found_11V.float() - expected_11V.float()).abs().max()
    return bool(far <= 1e-5 * expected_11V.float().abs().max())


def _after(labels_BT: Tensor) -> Tensor:
    return F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)


def _chunks(x_ND: Tensor, weight_VD: Tensor) -> list[slice]:
    size = max(1, _CELLS.get(x_ND.device.type, _CELLS_ELSEWHERE) // len(weight_VD))
    return [slice(at, at + size) for at in range(0, len(x_ND), size)]


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of cross entropies of ``x W' + b`` in float32, some rows at a time, computed anew for gradients."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_N: Tensor) -> Tensor:
        sums_N = x_ND.new_empty(len(x_ND), dtype=torch.float32)
        total = sums_N.new_zeros(())
        for rows in _chunks(x_ND, weight_VD):
            logits_CV = F.linear(x_ND[rows], weight_VD, bias_V).float()
            sums_N[rows] = logits_CV.logsumexp(-1)
            total += (sums_N[rows] - logits_CV.gather(1, labels_N[rows].unsqueeze(1)).squeeze(1)).sum()
        ctx.save_for_backward(x_ND, weight_VD, bias_V, labels_N, sums_N)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_ND, weight_VD, bias_V, labels_N, sums_N = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        dx_ND = torch.empty_like(x_ND) if wants_x else None
        dweight_VD = torch.zeros_like(weight_VD) if wants_weight else None
        dbias_V = torch.zeros_like(bias_V) if wants_bias else None
        for rows in _chunks(x_ND, weight_VD):
            share_CV = F.linear(x_ND[rows], weight_VD, bias_V).float()
            share_CV.sub_(sums_N[rows].unsqueeze(1)).exp_()
            label_C1 = labels_N[rows].unsqueeze(1)
            share_CV.scatter_add_(1, label_C1, torch.full_like(label_C1, -1, dtype=share_CV.dtype))
            dlogits_CV = share_CV.mul_(gradients[0]).to(x_ND.dtype)
            if dx_ND is not None:
                dx_ND[rows] = dlogits_CV @ weight_VD
            if dweight_VD is not None:
                dweight_VD.addmm_(dlogits_CV.T, x_ND[rows])
            if dbias_V is not None:
                dbias_V += dlogits_CV.sum(0)
        return dx_ND, dweight_VD, dbias_V, None
