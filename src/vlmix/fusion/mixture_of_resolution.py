"""Mixture of resolutions (LLaVA-HR, arXiv:2403.03003): one encoder's map enters the other one's backbone.

After some of the first encoder's blocks an adapter adds what the slow, high-resolution path saw, weighed by
one gate for each picture (the paper's equations 3 to 5); after the last block both paths are summed linearly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import torch
import torch.nn.functional as F
import transformers.initialization as init
from pydantic import PositiveInt
from torch import Tensor, nn

from vlmix.core.errors import PlanError
from vlmix.core.interfaces import Fusion, VisionEncoder
from vlmix.core.parts import FUSIONS
from vlmix.core.settings import PartSettings
from vlmix.core.tensors import FeatureMap, Grid, TextContext, VisionSpec, whole_ratio

_QUARTERS = 4


class MixtureOfResolutionSettings(PartSettings):
    """``after`` which blocks of the first encoder an adapter stands: after three quarters unless given.

    An empty list makes no adapters, only the sum at the end: LLaVA-HR's first stage.
    """

    kind: Literal["mixture_of_resolution"] = "mixture_of_resolution"  # pyright: ignore[reportIncompatibleVariableOverride]
    after: tuple[PositiveInt, ...] | None = None

    def shrunk(self, factor: int) -> Self:
        """As many adapters as before, behind the first blocks of those that are left."""
        return self if self.after is None else self.changed(after=tuple(range(1, len(self.after) + 1)))

    @classmethod
    def tiny(cls) -> Self:
        """One adapter, after the first block."""
        return cls(after=(1,))


class ResolutionAdapter(nn.Module):
    """One adapter: both paths transformed, the slow one added through the gate."""

    def __init__(self, fast: int, slow: int) -> None:
        super().__init__()
        self.slow_conv, self.slow_proj = nn.Conv2d(slow, slow, 1), nn.Conv2d(slow, fast, 1)
        self.fast_conv = nn.Conv2d(fast, fast, 7, padding=3, groups=fast)
        self.fast_proj = nn.Conv2d(fast, fast, 1)
        self.gate = nn.Sequential(nn.Linear(2 * fast, fast // 2), nn.GELU(), nn.Linear(fast // 2, 1))

    def reset(self) -> None:
        """Start as the identity: both last convolutions are zero."""
        for conv in (self.slow_conv, self.fast_conv):
            init.xavier_uniform_(conv.weight)
        for conv in (self.slow_proj, self.fast_proj):
            init.zeros_(conv.weight)

    def forward(self, fast: FeatureMap, slow: FeatureMap) -> Tensor:
        """The fast path's tokens with the slow path's added: (I, N, C)."""
        x_ICHW = fast.to_nchw()
        x_ICHW = x_ICHW + self.fast_proj(F.gelu(self.fast_conv(x_ICHW)))
        x_INC = FeatureMap.from_nchw(x_ICHW).tokens
        seen = FeatureMap.from_nchw(self.slow_proj(F.gelu(self.slow_conv(slow.to_nchw()))))
        s_INC = _fitted(seen, fast.grid).tokens
        gate_I11 = self.gate(torch.cat((x_INC, s_INC), dim=-1).mean(1)).tanh().unsqueeze(1)
        return x_INC + gate_I11 * s_INC


@FUSIONS.register("mixture_of_resolution")
class MixtureOfResolution(Fusion):
    """As many tokens as the first encoder gives, whatever the second one's resolution."""

    settings_class = MixtureOfResolutionSettings

    def __init__(self, settings: MixtureOfResolutionSettings, specs: Sequence[VisionSpec]) -> None:
        super().__init__()
        self.spec = self.plan(settings, specs)
        fast, slow = (spec.channels for spec in specs)
        self.after = _places(settings, specs[0])
        self.adapters = nn.ModuleList(ResolutionAdapter(fast, slow) for _ in self.after)
        self.fast_proj, self.slow_proj = nn.Linear(fast, fast), nn.Linear(slow, fast)

    @classmethod
    def plan(cls, settings: MixtureOfResolutionSettings, specs: Sequence[VisionSpec]) -> VisionSpec:
        """The first encoder's grid and channels.

        Raises:
            PlanError: if there are not two encoders, the first one's blocks pass on no tokens, an adapter
                would stand where no block is, or neither grid is a whole multiple of the other.

        """
        if len(specs) != 2:
            raise PlanError(
                "mixture_of_resolution: takes two encoders, first the one that is entered, then the one "
                f"whose map enters; there are {len(specs)}"
            )
        fast, slow = specs
        if not fast.token_blocks:
            raise PlanError(
                "mixture_of_resolution: the first encoder's blocks must pass tokens on, as those of clip do"
            )
        _places(settings, fast)
        larger, smaller = sorted((fast.grid, slow.grid), reverse=True)
        whole_ratio(larger, smaller, "mixture_of_resolution")
        return VisionSpec(fast.grid, fast.channels)

    @classmethod
    def warnings(cls, settings: MixtureOfResolutionSettings, specs: Sequence[VisionSpec]) -> list[str]:
        """A slow path that enters nowhere, or sees less than the fast one."""
        fast, slow = specs
        found = []
        if not _places(settings, fast):
            found.append(
                "mixture_of_resolution: `after` is empty, so the second encoder enters no block and is only "
                "added at the end, as in LLaVA-HR's first stage; name blocks for the adapters"
            )
        if slow.tokens < fast.tokens:
            found.append(
                f"mixture_of_resolution: the second encoder's {slow.grid} is coarser than the first's "
                f"{fast.grid}: it is interpolated and adds no resolution. Take a larger image_size for it"
            )
        return found

    def reset(self) -> None:
        """Adapters start as identities; the sum at the end starts from any Linear's weights."""
        super().reset()
        for adapter in self.adapters:
            if isinstance(adapter, ResolutionAdapter):
                adapter.reset()

    def forward(
        self,
        encoders: Sequence[VisionEncoder],
        pixel_values: Tensor,
        context: TextContext | None = None,
    ) -> FeatureMap:
        """Run the slow path whole, then the fast one block by block with the adapters between."""
        fast, slow = encoders
        seen = slow(pixel_values)
        adapters = dict(zip(self.after, self.adapters, strict=True))
        x = fast.embed(pixel_values)
        for index in range(fast.spec.blocks):
            x = fast.block(index, x)
            if index + 1 in adapters:
                prefix, patches = x[:, : -self.spec.tokens], x[:, -self.spec.tokens :]
                x = torch.cat((prefix, adapters[index + 1](FeatureMap(patches, self.spec.grid), seen)), dim=1)
        joined = self.fast_proj(fast.finish(x).tokens)
        return FeatureMap(joined + self.slow_proj(_fitted(seen, self.spec.grid).tokens), self.spec.grid)


def _places(settings: MixtureOfResolutionSettings, fast: VisionSpec) -> tuple[int, ...]:
    """Numbers of blocks, from 1, behind which an adapter stands."""
    if settings.after is None:
        if fast.blocks % _QUARTERS:
            raise PlanError(
                f"mixture_of_resolution: {fast.blocks} blocks have no quarters; name blocks in `after`"
            )
        return tuple(fast.blocks * part // _QUARTERS for part in range(1, _QUARTERS))
    if list(settings.after) != sorted({*settings.after}) or any(k > fast.blocks for k in settings.after):
        raise PlanError(
            f"mixture_of_resolution: after: {list(settings.after)} must be some of 1 to {fast.blocks}, the "
            "first encoder's blocks, in ascending order"
        )
    return settings.after


def _fitted(found: FeatureMap, grid: Grid) -> FeatureMap:
    """The map on ``grid``: averaged where it has more cells, interpolated (corners aligned) where fewer."""
    return found.resampled(grid, "area" if found.grid > grid else "bilinear_corners")
