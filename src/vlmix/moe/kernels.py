"""How stacked experts are multiplied: by transformers' experts interface, or by a loop where that cannot.

The kernels are transformers' own (``grouped_mm``, ``batched_mm`` and those a device adds). The loop here
sorts choices by expert and multiplies those of one expert at a time, in any precision and at any width. On a
CPU it is the faster one: the kernels loop there too.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Final, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from vlmix.moe.gathered import Gatherable, can_gather, run_gathered
from vlmix.moe.products import Inside, Sorting, Weights, combine, own_precision, run_networks

LOOP: Final = "loop"
# Grouped products read rows in steps of this many bytes.
_ALIGNMENT: Final = 16
# Choices an expert has on average, up to which calls cost more than the room that inner values take.
_FEW: Final = 64


class Stacked(Gatherable, Protocol):
    """What the loop reads of stacked experts; transformers' kernels read more."""

    config: PreTrainedConfig
    num_experts: int
    inputs: int
    inner: int
    outputs: int
    _is_expert_parallel: bool

    @property
    def first_bias(self) -> Tensor | None:
        """Their biases."""
        ...

    @property
    def last_bias(self) -> Tensor | None:
        """The biases of ``down_proj``."""
        ...

    def inside(self, x_SI: Tensor) -> Tensor:
        """What stands between the two products."""
        ...

    def alone(self, expert: int, x_RD: Tensor) -> Tensor:
        """Rows through one expert."""
        ...

    def cast(self, dtype: torch.dtype) -> SimpleNamespace:
        """The same experts in another precision, for transformers' kernels."""
        ...


def kernel_for(experts: Stacked, dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
    """The name of the kernel that will run these experts, and why if it is the loop."""
    asked = experts.config._experts_implementation or "grouped_mm"
    if asked == "eager":
        return LOOP, "eager was asked for"
    if experts.outputs != experts.inputs:
        return LOOP, f"the experts give {experts.outputs} channels for {experts.inputs}"
    if dtype == torch.float64:
        return LOOP, "the kernels have no float64"
    step = _ALIGNMENT // dtype.itemsize
    if odd := [size for size in (experts.inputs, experts.inner) if size % step]:
        return LOOP, f"{odd[0]} is no multiple of {step} numbers of {dtype}"
    if device.type == "cpu" and asked == "grouped_mm":
        return LOOP, "on a CPU it is faster for few tokens and as fast for many"
    return asked, ""


def run_kernel(experts: Stacked, x_RD: Tensor, indices_RK: Tensor, weights_RK: Tensor) -> Tensor:
    """Rows through their experts, weighted and summed: (R, O), in their precision or that of autocast."""
    if x_RD.is_meta:
        return on_shapes(experts, x_RD, indices_RK)
    device, dtype = x_RD.device.type, compute_dtype(x_RD)
    name, _ = kernel_for(experts, dtype, x_RD.device)
    # Neither the kernels nor the loop leave precision to autocast.
    with own_precision(device):
        if name == LOOP:
            return loop(experts, x_RD.to(dtype), indices_RK, weights_RK)
        run = ALL_EXPERTS_FUNCTIONS.get_interface(name, loop)
        same = dtype == experts.down_proj.dtype
        return run(experts if same else experts.cast(dtype), x_RD.to(dtype), indices_RK, weights_RK.to(dtype))


def compute_dtype(x: Tensor) -> torch.dtype:
    """The precision in which a Linear would multiply ``x`` here; autocast leaves float64 alone."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def on_shapes(experts: Stacked, x_RD: Tensor, indices_RK: Tensor) -> Tensor:
    """The same work without data, whose choices nobody knows: as many rows, all through one expert."""
    y_SO = experts.alone(0, x_RD.repeat_interleave(indices_RK.shape[1], 0))
    return y_SO.unflatten(0, indices_RK.shape).sum(1)


def loop(experts: Stacked, x_RD: Tensor, indices_RK: Tensor, weights_RK: Tensor) -> Tensor:
    """Rows sorted by expert, one product for each expert that has any: (R, O)."""
    if not torch.is_grad_enabled():
        if len(x_RD) == 1 and not experts._is_expert_parallel:
            return _one_row(experts, x_RD, indices_RK, weights_RK)
        if indices_RK.numel() > _FEW * experts.num_experts:
            return _many_rows(experts, x_RD, indices_RK, weights_RK)
    if len(x_RD) == 1 and can_gather(experts, chosen := indices_RK[0].tolist()):
        return run_gathered(experts, x_RD, weights_RK, chosen)
    weights = Weights(experts.first, experts.down_proj, experts.first_bias, experts.last_bias)
    inside = Inside(experts.inside, tuple(experts.act_fn.parameters()))
    return run_networks(x_RD, weights_RK, Sorting.of(indices_RK, experts.num_experts), weights, inside)


def _one_row(experts: Stacked, x_1D: Tensor, indices_1K: Tensor, weights_1K: Tensor) -> Tensor:
    """One token of an answer: there is nothing to sort."""
    y_KO = torch.cat([experts.alone(expert, x_1D) for expert in indices_1K[0].tolist()])
    return (weights_1K.T * y_KO).sum(0, keepdim=True).to(x_1D.dtype)


def _many_rows(experts: Stacked, x_RD: Tensor, indices_RK: Tensor, weights_RK: Tensor) -> Tensor:
    """Without gradients nothing is kept, so inner values are there for one expert at a time."""
    sorting = Sorting.of(indices_RK, experts.num_experts)
    y_SO = sorting.empty(x_RD, experts.outputs)
    for expert, rows, y in zip(
        sorting.experts, sorting.parts(sorting.rows), sorting.parts(y_SO), strict=False
    ):
        y.copy_(experts.alone(expert, x_RD.index_select(0, rows)))
    return combine(y_SO, weights_RK, sorting)
