"""Mixture of vision experts: every encoder's map on one grid, weighted by what the user asked, and added.

Shen et al., MoME (arXiv:2407.12709), section 3.1, ``MoVE``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from pydantic import Field, PositiveInt
from torch import nn

from vlmix.core.errors import PlanError
from vlmix.core.interfaces import LateFusion, Router
from vlmix.core.parts import FUSIONS, ROUTERS, read_part
from vlmix.core.settings import SHRUNK_WIDTH, PartSettings
from vlmix.core.tape import record
from vlmix.core.tensors import FeatureMap, Grid, Routing, TextContext, VisionSpec
from vlmix.fusion._adaptive import AdaptiveAverage, AdaptiveDeformable
from vlmix.fusion._mining import no_autocast


class MixtureOfVisionExpertsSettings(PartSettings):
    """Every map comes to ``grid`` and ``width``; ``instruction`` is the decoder's width, if another.

    ``align``: ``adaptive_deformable`` has ``depth`` layers with ``heads`` of ``points`` points each;
    ``average`` only pools. ``weights``: ``router`` asks a router that reads the instruction (``k`` left out:
    it weighs all encoders); ``add`` and ``mean`` treat all encoders alike.
    """

    kind: Literal["mixture_of_vision_experts"] = "mixture_of_vision_experts"  # pyright: ignore[reportIncompatibleVariableOverride]
    lengths = ("grid",)
    grid: tuple[PositiveInt, PositiveInt] = (16, 16)
    width: PositiveInt = 4096
    instruction: PositiveInt | None = None
    align: Literal["adaptive_deformable", "average"] = "adaptive_deformable"
    depth: PositiveInt = 6
    heads: PositiveInt = 8
    points: PositiveInt = 4
    weights: Literal["router", "add", "mean"] = "router"
    router: dict[str, Any] = Field(default_factory=lambda: {"kind": "instance"})

    @classmethod
    def tiny(cls) -> Self:
        """Four tokens as wide as a shrunk decoder, one layer of two heads."""
        return cls(grid=(2, 2), width=SHRUNK_WIDTH, depth=1, heads=2, points=2)


@FUSIONS.register("mixture_of_vision_experts")
class MixtureOfVisionExperts(LateFusion):
    """F = sum_i g_i f_i with g = router(instruction): one weight for each encoder and image.

    The decision goes on the tape as that of layer ``fusion``, with the norm of each g_i f_i: maps differ in
    size, so that their weights alone do not say what matters.
    """

    settings_class = MixtureOfVisionExpertsSettings

    def __init__(self, settings: MixtureOfVisionExpertsSettings, specs: Sequence[VisionSpec]) -> None:
        super().__init__()
        self.settings = settings
        promised = self.plan(settings, specs)
        self.aligned = nn.ModuleList(_alignment(settings, spec, promised.grid) for spec in specs)
        self.router = _router(settings, len(specs)) if settings.weights == "router" else None

    @classmethod
    def plan(cls, settings: MixtureOfVisionExpertsSettings, specs: Sequence[VisionSpec]) -> VisionSpec:
        """The grid and width of the settings.

        Raises:
            PlanError: if there is no second encoder, heads do not share an encoder's channels, or the router
                reads something else than the instruction.

        """
        name = "mixture_of_vision_experts"
        if len(specs) < 2:
            raise PlanError(f"{name}: needs a second encoder to mix with; there is {len(specs)}")
        odd = [spec.channels for spec in specs if spec.channels % settings.heads]
        if odd and settings.align == "adaptive_deformable":
            raise PlanError(
                f"{name}: {settings.heads} heads do not share {odd[0]} channels evenly; take a number that "
                "divides them, or align: average"
            )
        if settings.weights == "router":
            _plan_router(settings, len(specs))
        return VisionSpec(settings.grid, settings.width)

    @classmethod
    def instruction_width(cls, settings: MixtureOfVisionExpertsSettings) -> int | None:
        """The decoder's width, where a router weighs the encoders."""
        return None if settings.weights != "router" else settings.instruction or settings.width

    def reset(self) -> None:
        """References on a regular grid; the router starts by its own rule."""
        super().reset()
        for alignment in self.aligned:
            alignment.reset()  # pyright: ignore[reportCallIssue]
        if self.router is not None:
            self.router.reset()

    def merge(self, maps: Sequence[FeatureMap], context: TextContext | None = None) -> FeatureMap:
        """Align every map, weigh, add."""
        found_EIND = [align(one) for align, one in zip(self.aligned, maps, strict=True)]
        if self.router is None:
            total_IND = torch.stack(found_EIND).sum(0)
            share = 1.0 if self.settings.weights == "add" else 1 / len(maps)
            return FeatureMap(total_IND * share, self.settings.grid)
        routing = self._routed(self.router, context, len(maps[0].tokens))
        shares_IE = routing.weights.new_zeros(routing.logits.shape)
        shares_IE = shares_IE.scatter(1, routing.indices, routing.weights)
        weighed = [x * g[:, None, None].to(x) for x, g in zip(found_EIND, shares_IE.unbind(1), strict=True)]
        norms_IE = torch.stack([x.detach().float().flatten(1).norm(dim=1) for x in weighed], 1)
        record(replace(routing, layer="fusion", norms=norms_IE.gather(1, routing.indices)))
        return FeatureMap(torch.stack(weighed).sum(0), self.settings.grid)

    @staticmethod
    def _routed(router: Router, context: TextContext | None, images: int) -> Routing:
        if context is None:
            raise PlanError(
                "fusion: its router reads the instruction, and this forward pass has none. Pass what "
                "VlmixProcessor gave, `instruction_ids` included"
            )
        told_ITD, mask_IT1 = context.embeddings.float(), context.mask.unsqueeze(-1).float()
        if len(told_ITD) != images:
            raise PlanError(f"fusion: {len(told_ITD)} instructions for {images} images")
        mean_I1D = ((told_ITD * mask_IT1).sum(1) / mask_IT1.sum(1).clamp_min(1)).unsqueeze(1)
        with no_autocast(mean_I1D):
            return router(mean_I1D)


def _alignment(settings: MixtureOfVisionExpertsSettings, spec: VisionSpec, grid: Grid) -> nn.Module:
    if settings.align == "average":
        return AdaptiveAverage(spec, grid, settings.width)
    return AdaptiveDeformable(spec, grid, settings.width, settings.depth, settings.heads, settings.points)


def _plan_router(settings: MixtureOfVisionExpertsSettings, encoders: int) -> tuple[type[Router], Any]:
    """The router's class and settings.

    Raises:
        PlanError: if it does not fit.

    """
    raw = read_part(ROUTERS, {"k": encoders, **settings.router}, "fusion.router")
    kind = ROUTERS.get(raw.kind)
    if kind.reads != "instruction":
        raise PlanError(f"fusion.router: {raw.kind} does not read the instruction; take {{kind: instance}}")
    kind.plan(raw, encoders)
    return kind, raw


def _router(settings: MixtureOfVisionExpertsSettings, encoders: int) -> Router:
    kind, raw = _plan_router(settings, encoders)
    return kind(raw, settings.instruction or settings.width, encoders)
