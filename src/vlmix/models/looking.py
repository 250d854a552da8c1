"""What a fusion asks of its encoders, and their answers without the rest of the model.

Encoders that are frozen say the same about a picture each time. They run here by themselves, a fixed number
of views at once: what they say then does not depend on which pictures share a batch, to the last bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vlmix.core.interfaces import Router, VisionEncoder
from vlmix.core.parts import FUSIONS
from vlmix.core.tensors import FeatureMap, TextContext, VisionSpec
from vlmix.models.features import Maps, SeenPictures
from vlmix.models.modeling import VlmixModel

_SMALL = 2**22  # weights; a view takes about 4 ms then
Asked = Literal["nothing", "map", "levels"]


def at_once(device: torch.device, encoder: nn.Module) -> int:
    """How many views an encoder is shown together; the last one is shown again to fill up.

    A CPU is no slower with one, but for small encoders, whose time goes into calling kernels.
    """
    if device.type != "cpu":
        return 8
    return 4 if sum(parameter.numel() for parameter in encoder.parameters()) < _SMALL else 1


def obstacle(model: VlmixModel) -> str:
    """Why encoders must run in every step, in words that follow "because"; empty if they need not."""
    if any(isinstance(parameter, DTensor) for parameter in model.encoders.parameters()):
        return "its weights are divided among processes, which must all run the same parts"
    try:
        asked = questions(model)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        kind = model.config.fusion_settings().kind
        return f"the fusion `{kind}` needs more of its encoders than finished maps ({error})"
    for number, what in enumerate(asked):
        encoder = cast("nn.Module", model.encoders[number])
        if what != "nothing" and (found := _own_obstacle(encoder)):
            return f"encoder {number} {found}"
    return ""


def questions(model: VlmixModel) -> tuple[Asked, ...]:
    """Which answer the fusion asks each encoder for, found by letting it ask for one picture.

    Raises:
        AttributeError: if it asks for more than whole maps and levels.

    """
    viewing, config = model.viewing, model.config
    views, settings = viewing.count(viewing.plan.tiling), config.fusion_settings()
    width = FUSIONS.get(settings.kind).instruction_width(settings)
    context = None
    if width is not None:
        zeros_V1D = torch.zeros(views, 1, width, device=model.device)
        context = TextContext(zeros_V1D, torch.ones(views, 1, dtype=torch.bool, device=model.device))
    empty = torch.empty(views, 3, 0, 0, device=model.device)
    probes = [_Probe(spec, scope == "picture", views, model) for spec, scope in _encoders(model)]
    shown = viewing.scoped(
        cast("list[VisionEncoder]", probes), empty, [viewing.plan.tiling], masked=model.fusion.reads_masks
    )
    on = [model.device] if model.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=on):
        model.fusion(shown, empty, context)
    return tuple(probe.asked for probe in probes)


@torch.no_grad()
def look(
    model: VlmixModel,
    asked: Sequence[Asked],
    pixel_values: Tensor,
    picture_values: Tensor | None,
    told: Callable[[int, float], None] | None = None,
) -> SeenPictures:
    """What the encoders give for these pictures, where the fusion asks them.

    ``told`` is given each encoder's number and the seconds it took.
    """
    views = model.views.spread(pixel_values)
    pictures = picture_values if model.viewing.plan.varies else pixel_values
    maps: list[Maps] = []
    together = zip(model.encoders, asked, model.viewing.scopes, strict=True)
    for number, (encoder, what, scope) in enumerate(together):
        begun = _clock(pixel_values.device) if told is not None else 0.0
        shown = cast("Tensor", pictures) if scope == "picture" else views
        maps.append(() if what == "nothing" else _answers(cast("VisionEncoder", encoder), what, shown))
        if told is not None:
            told(number, _clock(pixel_values.device) - begun)
    return SeenPictures(tuple(maps), pixel_values.shape[0])


@torch.no_grad()
def layout(model: VlmixModel, asked: Sequence[Asked]) -> list[list[tuple[int, ...]]]:
    """The strides that each encoder's map, or its levels, have in memory: learnt from empty pictures."""
    side = model.config.image_size
    found: list[list[tuple[int, ...]]] = []
    for encoder, what in zip(cast("list[VisionEncoder]", [*model.encoders]), asked, strict=True):
        # Of a single view the first axis may have any stride.
        count = max(2, at_once(model.device, encoder))
        empty = torch.zeros(count, 3, side, side, dtype=torch.uint8, device=model.device)
        answers = [] if what == "nothing" else _ask(encoder, what)(empty)
        found.append([answer.tokens.stride() for answer in answers])
    return found


def _clock(device: torch.device) -> float:
    """Seconds, when what was asked of the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _ask(encoder: VisionEncoder, what: Asked) -> Callable[[Tensor], Sequence[FeatureMap]]:
    return encoder.levels if what == "levels" else lambda pixels: [encoder(pixels)]


def _answers(encoder: VisionEncoder, what: Asked, shown: Tensor) -> Maps:
    count = at_once(shown.device, encoder)
    ask, parts = _ask(encoder, what), list[list[FeatureMap]]()
    for some in shown.split(count):
        answers = ask(_filled(some, count))
        parts.append([FeatureMap(found.tokens[: len(some)], found.grid) for found in answers])
    return tuple(
        FeatureMap(torch.cat([part.tokens for part in level]), level[0].grid)
        for level in zip(*parts, strict=True)
    )


def _filled(some: Tensor, count: int) -> Tensor:
    """As many views, the last one repeated where there are too few."""
    missing = count - len(some)
    return some if not missing else torch.cat([some, *[some[-1:]] * missing])


def _own_obstacle(encoder: nn.Module) -> str:
    parameters = list(encoder.parameters())
    if not parameters:
        return "has no weights, so that there is nothing to save"
    if any(parameter.requires_grad for parameter in parameters):
        return "is trained"
    if any(isinstance(module, Router) for module in encoder.modules()):
        return "holds experts, whose routing belongs to every step"
    return ""


def _encoders(model: VlmixModel) -> list[tuple[VisionSpec, str]]:
    return list(zip(model.viewing.plan.encoders, model.viewing.scopes, strict=True))


class _Probe:
    """Answers with zeros, as any picture's map, and remembers what it was asked for."""

    def __init__(self, spec: VisionSpec, whole: bool, views: int, model: VlmixModel) -> None:
        self.spec, self.rows, self.device = spec, 1 if whole else views, model.device
        self.dtype = next(
            (p.dtype for p in model.fusion.parameters() if p.is_floating_point()), torch.float32
        )
        self.asked: Asked = "nothing"

    def __call__(self, pixel_values: Tensor) -> FeatureMap:
        self._note("map")
        return self._zeros(self.spec)

    def levels(self, pixel_values: Tensor) -> list[FeatureMap]:
        self._note("levels")
        return [self._zeros(level) for level in self.spec.levels or (self.spec,)]

    def _note(self, what: Asked) -> None:
        if self.asked not in {"nothing", what}:
            raise AttributeError("it asks for a map and for its levels")
        self.asked = what

    def _zeros(self, spec: VisionSpec) -> FeatureMap:
        zeros_INC = torch.zeros(self.rows, spec.tokens, spec.channels, device=self.device, dtype=self.dtype)
        return FeatureMap(zeros_INC, spec.grid)
