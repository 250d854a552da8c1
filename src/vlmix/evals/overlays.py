"""Where each patch of a picture went, drawn over the picture as the model sees it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from PIL import Image

from vlmix.core.sample import ImageRef, Sample
from vlmix.core.tensors import Grid
from vlmix.core.views import Box, Tiling
from vlmix.evals.controls import question_of
from vlmix.evals.gallery import Picture, picture_of
from vlmix.moe.install import DECODER
from vlmix.moe.recorder import Note, RoutingRecorder

if TYPE_CHECKING:
    from vlmix.core.interfaces import VisionEncoder
    from vlmix.evals.window import RoutingWindow
    from vlmix.models.viewing import Viewing

_WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
_SIDE = 100.0  # of the drawing, whatever the picture's


@dataclass(frozen=True, slots=True)
class Patches:
    """Patches that went to one expert, as an SVG path in a drawing 100 wide."""

    expert: int
    path: str


@dataclass(frozen=True, slots=True)
class Overlay:
    """One layer's choices over one picture."""

    layer: str
    patches: Sequence[Patches]


@dataclass(frozen=True, slots=True)
class Example:
    """One picture with the choices of a few layers; ``height`` is that of a drawing 100 wide."""

    sample_id: str
    question: str
    picture: Picture
    height: float
    overlays: Sequence[Overlay]


def examples_of(window: RoutingWindow, samples: Sequence[Sample]) -> list[Example]:
    """The kept samples' first pictures, each with the first, middle and last layer of every mixture.

    Layers whose decisions have no place in the picture (whole rows, strips without a grid) are left out.
    """
    return [_example(window, sample) for sample in samples]


def _example(window: RoutingWindow, sample: Sample) -> Example:
    viewing: Viewing = window.model.model.viewing
    opened = window.processor.image_processor.open(sample.images)
    tilings = viewing.tilings(opened.pixel_values, opened.image_tilings)
    shown = sample.images[0]
    if not viewing.plan.varies:
        shown = ImageRef(Image.fromarray(opened.pixel_values[0].permute(1, 2, 0).numpy()))
    width, height = shown.size()
    ratio = height / width
    overlays: list[Overlay] = []
    for notes in window.recorder.mixtures().values():
        drawn = [_overlay(window, sample.id, note, tilings, ratio) for note in notes]
        able = [overlay for overlay in drawn if overlay is not None]
        overlays += [able[place] for place in sorted({0, len(able) // 2, len(able) - 1}) if able]
    question = question_of(sample).turns[-1].text.strip()
    return Example(sample.id, question, picture_of(shown), round(_SIDE * ratio, 2), overlays)


def _overlay(
    window: RoutingWindow, name: str, note: Note, tilings: Sequence[Tiling], ratio: float
) -> Overlay | None:
    kept = _kept(window.recorder, name, note)
    if kept is None:
        return None
    firsts = [row[0] for row in kept["experts"]]
    places = _places(window, note, tilings, len(firsts))
    return Overlay(note.name, _drawn(places, firsts, ratio)) if places else None


def _kept(recorder: RoutingRecorder, name: str, note: Note) -> Mapping[str, Any] | None:
    found = recorder.examples.get(name, {}).get(note.name)
    return found if found is not None and found["experts"] and not note.whole else None


def _places(
    window: RoutingWindow, note: Note, tilings: Sequence[Tiling], decisions: int
) -> list[tuple[int, Box]]:
    """Which decisions are about the first picture, and where in it; empty if that cannot be said."""
    model, viewing = window.model.model, window.model.model.viewing
    boxes = viewing.views.boxes(viewing.settings, tilings[0])
    views = sum(viewing.count(tiling) for tiling in tilings)
    if note.place == DECODER:
        grid = viewing.plan.projected.grid
        order_N = viewing.order(tilings[:1], torch.device("cpu"))
        cells = _cells(boxes, grid)
        numbers = range(len(cells)) if order_N is None else order_N.tolist()
        shown = _on_top(boxes, cells)
        placed = [(token, cells[cell]) for token, cell in enumerate(numbers) if cell in shown]
        return [] if _is_strip(grid) else placed
    if note.place == "projector":
        grid = viewing.plan.fused.grid
    elif note.place.startswith("encoders."):
        number = int(note.place.removeprefix("encoders."))
        spec = cast("VisionEncoder", model.encoders[number]).spec
        grid = spec.grid if spec.token_blocks else (0, 0)
        if viewing.scopes[number] == "picture":
            boxes, views = (_WHOLE,), len(tilings)
    else:
        return []
    # The patch tokens of an encoder come last, behind class and register tokens.
    each = decisions // views
    before = each - math.prod(grid)
    if _is_strip(grid) or decisions % views or before < 0:
        return []
    cells = _cells(boxes, grid)
    shown = _on_top(boxes, cells)
    at = [view * each + before + cell for view in range(len(boxes)) for cell in range(math.prod(grid))]
    return [(at[cell], cells[cell]) for cell in sorted(shown)]


def _is_strip(grid: Grid) -> bool:
    return 0 in grid or grid[0] == 1 < grid[1]


def _cells(boxes: Sequence[Box], grid: Grid) -> list[Box]:
    """The cells of every view, row by row, as boxes of the picture."""
    rows, columns = grid
    return [
        (
            top + (bottom - top) * row / rows,
            left + (right - left) * column / columns,
            top + (bottom - top) * (row + 1) / rows,
            left + (right - left) * (column + 1) / columns,
        )
        for top, left, bottom, right in boxes
        for row in range(rows)
        for column in range(columns)
    ]


def _on_top(boxes: Sequence[Box], cells: Sequence[Box]) -> set[int]:
    """The cells that no finer view covers (of equal ones: no later view), so that colours do not mix."""
    each, shown, above = len(cells) // len(boxes), set[int](), list[Box]()
    for view in sorted(range(len(boxes)), key=lambda view: (_area(boxes[view]), -view)):
        for number in range(view * each, (view + 1) * each):
            top, left, bottom, right = cells[number]
            y, x = (top + bottom) / 2, (left + right) / 2
            if not any(box[0] < y < box[2] and box[1] < x < box[3] for box in above):
                shown.add(number)
        above.append(boxes[view])
    return shown


def _area(box: Box) -> float:
    # Rounded, for views of one size differ in the last digit.
    return round((box[2] - box[0]) * (box[3] - box[1]), 6)


def _drawn(places: Sequence[tuple[int, Box]], firsts: Sequence[int], ratio: float) -> list[Patches]:
    """One path for each expert."""
    paths: dict[int, list[str]] = {}
    for decision, (top, left, bottom, right) in places:
        x, y = _SIDE * left, _SIDE * ratio * top
        wide, high = _SIDE * (right - left), _SIDE * ratio * (bottom - top)
        path = f"M{x:.2f} {y:.2f}h{wide:.2f}v{high:.2f}h{-wide:.2f}z"
        paths.setdefault(firsts[decision], []).append(path)
    return [Patches(expert, "".join(found)) for expert, found in sorted(paths.items()) if expert >= 0]
