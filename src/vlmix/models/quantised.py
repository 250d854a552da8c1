"""Linears whose weight is kept in 4 bits (NF4), for adapters to stand on; plain torch, on every device.

Blocks of 64 weights, row after row, share their largest magnitude as a scale; each weight is the nearest of
16 levels, two to a byte, the first in the upper half: the layout of bitsandbytes without double quantisation,
4.5 bits a weight. Paper: QLoRA, arXiv:2305.14314, section 3 and appendix E.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
import transformers.initialization as init
from torch import Tensor, nn

_BLOCK = 64
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


class Nf4Linear(nn.Module):
    """A frozen Linear in 4 bits; ``weight`` is computed anew at each call and for each gradient."""

    packed: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        count, device = linear.weight.numel(), linear.weight.device
        self.register_buffer("packed", torch.empty(-(-count // 2), dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.empty(-(-count // _BLOCK), dtype=torch.float32, device=device))
        self.bias = linear.bias
        self.fill(linear.weight)

    @property
    def weight(self) -> Tensor:
        """The weight (O, I) that the 4 bits stand for."""
        return dequantised(self.packed, self.scales, (self.out_features, self.in_features))

    @torch.no_grad()
    def fill(self, weight_OI: Tensor) -> None:
        """Keep the nearest there is to ``weight_OI``; what was read from 4 bits comes back bit for bit."""
        packed, scales = quantised(weight_OI)
        self.packed.copy_(packed)
        self.scales.copy_(scales)

    def reset(self) -> None:
        """Start as torch's own Linear would; leaves weights that came from a checkpoint alone."""
        bound = 1 / math.sqrt(self.in_features)
        shape = (self.out_features, self.in_features)
        packed, scales = quantised(torch.empty(shape, device=self.packed.device).uniform_(-bound, bound))
        init.copy_(self.packed, packed)
        init.copy_(self.scales, scales)

    def plain(self) -> nn.Linear:
        """A Linear with this weight in full, and the same bias."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=False)
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        linear.bias = cast("nn.Parameter", self.bias)
        return linear

    def forward(self, x: Tensor) -> Tensor:
        """What the Linear gives: (…, I) -> (…, O)."""
        shape = (self.out_features, self.in_features)
        y = cast("Tensor", _Product.apply(x, self.packed, self.scales, shape))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Widths, as torch's Linear tells them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits=4"


class _Product(torch.autograd.Function):
    """x W^T without keeping W for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scales: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(packed, scales)
        ctx.shape = shape
        return F.linear(x, dequantised(packed, scales, shape).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        packed, scales = ctx.saved_tensors
        weight_OI = dequantised(packed, scales, ctx.shape)
        return gradients[0] @ weight_OI.to(gradients[0].dtype), None, None, None


def quantised(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """A weight as packed levels (bytes) and one float32 scale for each block."""
    flat_N = weight_OI.detach().float().flatten()
    blocks_MK = F.pad(flat_N, (0, -flat_N.numel() % _BLOCK)).view(-1, _BLOCK)
    scales_M = blocks_MK.abs().amax(1)
    levels = _levels(weight_OI.device)
    middles = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(blocks_MK / scales_M.where(scales_M > 0, 1.0)[:, None], middles)
    pairs = F.pad(codes.flatten()[: flat_N.numel()].to(torch.uint8), (0, flat_N.numel() % 2)).view(-1, 2)
    return pairs[:, 0] * 16 + pairs[:, 1], scales_M


def dequantised(packed: Tensor, scales_M: Tensor, shape: tuple[int, int]) -> Tensor:
    """The weight of this shape that packed levels and scales stand for, in the scales' precision."""
    count = shape[0] * shape[1]
    codes = torch.stack((packed >> 4, packed & 15), 1).flatten()[:count].int()
    values = _levels(packed.device).to(scales_M.dtype)[codes]
    blocks_MK = F.pad(values, (0, -count % _BLOCK)).view(-1, _BLOCK)
    return (blocks_MK * scales_M[:, None]).flatten()[:count].view(shape)


def quantised_numbers(module: nn.Module) -> tuple[int, int]:
    """How many weights below ``module`` are kept in 4 bits, and the bytes that they and their scales take."""
    layers = [layer for layer in module.modules() if isinstance(layer, Nf4Linear)]
    numbers = sum(layer.in_features * layer.out_features for layer in layers)
    return numbers, sum(layer.packed.nbytes + layer.scales.nbytes for layer in layers)


def _levels(device: torch.device) -> Tensor:
    # A compiler makes a constant of it, and complains about the cache.
    return torch.tensor(LEVELS, device=device) if torch.compiler.is_compiling() else _kept(device)


@lru_cache(maxsize=8)
def _kept(device: torch.device) -> Tensor:
    # An ordinary tensor even where the first call is an answer: it is kept for training after it.
    with torch.inference_mode(False):
        return torch.tensor(LEVELS, device=device)
