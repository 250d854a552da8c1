"""The vision parts at work on one question's pictures, and tokens drawn from many."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vlmix.core.errors import InputError
from vlmix.core.sample import Sample
from vlmix.core.tape import recording
from vlmix.core.tensors import FeatureMap, Grid, Routing
from vlmix.evals.controls import question_of
from vlmix.evals.diagnostics._standing_in import Change, changed, whole_map

if TYPE_CHECKING:
    from vlmix.models.modeling import VlmixForConditionalGeneration
    from vlmix.models.processing import VlmixProcessor

TOKENS = 2048
"""About so many tokens of each encoder are looked at, however many there are."""
PICTURES = 64
"""They come from at most so many pictures."""


@dataclass(frozen=True)
class Seen:
    """What one question's views became: each encoder's map, ``None`` of one that does not run, and after."""

    maps: list[FeatureMap | None]
    fused: Float[Tensor, "v n c"]
    routing: tuple[Routing, ...]
    views: Float[Tensor, "v 3 s s"]


@torch.inference_mode()
def look_at(model: VlmixForConditionalGeneration, processor: VlmixProcessor, sample: Sample) -> Seen | None:
    """Run encoders and fusion on the pictures of a question, alone; ``None`` if it has none that opens.

    The decoder does not run.
    """
    if not sample.images or sample.defect:
        return None
    try:
        batch = processor.collate([processor.encode(question_of(sample), supervise=False)])
    except InputError:
        return None
    inputs = {
        name: tensor.to(model.device)
        for name, tensor in batch.items()
        if name not in {"labels", "input_ids", "attention_mask"}
    }
    vision, given = model.model, dict[int, list[FeatureMap]]()
    watching: dict[int, Change] = {number: _keeper(given, number) for number in range(len(vision.encoders))}
    with changed(vision, watching), recording() as tape:
        fused = vision.get_image_features(**inputs).last_hidden_state
    specs = vision.viewing.plan.offered
    maps = [whole_map(given[i], spec) if i in given else None for i, spec in enumerate(specs)]
    if fused is None:
        raise TypeError("get_image_features gave no fused map")
    return Seen(maps, fused, tuple(tape), vision.views.spread(inputs["pixel_values"]))


def _keeper(given: dict[int, list[FeatureMap]], number: int) -> Change:
    def keep(maps: list[FeatureMap]) -> list[FeatureMap]:
        given[number] = maps
        return maps

    return keep


@dataclass(frozen=True)
class Looks:
    """Tokens drawn from many pictures, in float64 on the CPU, by encoder (``None`` of one that does not run).

    ``own`` (T, C) are of each encoder's own grid. ``common`` (T, C) are all encoders' at the same places of
    one grid, the coarsest: finer maps are averaged onto it; ``None`` where maps are strips without a
    rectangle. ``fused`` (T, C) are what the projector reads.
    """

    own: list[Tensor | None]
    common: list[Tensor | None] | None
    common_grid: Grid | None
    fused: Tensor
    pictures: int

    @staticmethod
    def gathered(
        model: VlmixForConditionalGeneration,
        processor: VlmixProcessor,
        samples: Sequence[Sample],
        seed: int,
    ) -> Looks:
        """Draw the same number of tokens from each of the first distinct pictures.

        Raises:
            InputError: if no question has a picture that opens.

        """
        chosen = _distinct(samples)
        if not chosen:
            raise InputError("no question shows a picture, so encoders see nothing; take another benchmark")
        each, draws = math.ceil(TOKENS / len(chosen)), torch.Generator().manual_seed(seed)
        rows: list[tuple[list[Tensor | None], list[Tensor | None] | None, Tensor]] = []
        grid: Grid | None = None
        for sample in chosen:
            seen = look_at(model, processor, sample)
            if seen is None:
                continue
            grid = _common_grid(seen.maps)
            own = [None if m is None else _drawn(m.tokens, each, draws) for m in seen.maps]
            rows.append((own, _together(seen.maps, grid, each, draws), _drawn(seen.fused, each, draws)))
        if not rows:
            raise InputError("no question's picture can be opened, so encoders see nothing")
        alone, together, fused = zip(*rows, strict=True)
        shared = [both for both in together if both is not None]
        return Looks(
            own=_stacked(alone),
            common=_stacked(shared) if grid else None,
            common_grid=grid,
            fused=torch.cat(fused),
            pictures=len(rows),
        )


def _distinct(samples: Sequence[Sample]) -> list[Sample]:
    """The first question about each picture, or set of pictures."""
    found: dict[tuple[str, ...], Sample] = {}
    for sample in samples:
        if len(found) == PICTURES:
            break
        try:
            shown = tuple(image.digest() for image in sample.images)
        except InputError:
            continue
        if shown:
            found.setdefault(shown, sample)
    return list(found.values())


def _common_grid(maps: Sequence[FeatureMap | None]) -> Grid | None:
    """The coarsest rows and columns, or ``None`` where a map is a strip and not all are the same one."""
    grids = {found.grid for found in maps if found is not None}
    if len(grids) > 1 and any(rows == 1 < columns for rows, columns in grids):
        return None
    return min(rows for rows, _ in grids), min(columns for _, columns in grids)


def _together(
    maps: Sequence[FeatureMap | None], grid: Grid | None, each: int, draws: torch.Generator
) -> list[Tensor | None] | None:
    if grid is None:
        return None
    fitted = [None if found is None else _averaged(found, grid) for found in maps]
    tokens = next(found.shape[0] * found.shape[1] for found in fitted if found is not None)
    at = torch.randperm(tokens, generator=draws)[:each]
    return [None if found is None else found.flatten(0, 1)[at] for found in fitted]


def _averaged(found: FeatureMap, grid: Grid) -> Tensor:
    x = found.to_nchw().double().cpu()
    return (x if grid == found.grid else F.adaptive_avg_pool2d(x, grid)).flatten(2).transpose(1, 2)


def _drawn(tokens_VNC: Tensor, each: int, draws: torch.Generator) -> Tensor:
    flat = tokens_VNC.flatten(0, 1)
    at = torch.randperm(len(flat), generator=draws)[:each]
    return flat[at.to(flat.device)].double().cpu()


def _stacked(rows: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
    found: list[Tensor | None] = []
    for parts in zip(*rows, strict=True):
        kept = [part for part in parts if part is not None]
        found.append(torch.cat(kept) if kept else None)
    return found
