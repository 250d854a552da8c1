"""Where patch mining looks: each query's weights over its window, laid over the picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from vlmix.core.sample import Sample
from vlmix.core.tensors import FeatureMap, Grid
from vlmix.evals.controls import question_of
from vlmix.evals.diagnostics import DIAGNOSTICS
from vlmix.evals.diagnostics._base import Diagnostic, Figure, Finding, Table
from vlmix.evals.diagnostics._drawing import windows_picture
from vlmix.evals.diagnostics._telling import number, rounded
from vlmix.fusion.patch_mining import PatchMining

if TYPE_CHECKING:
    from vlmix.evals.diagnostics._looks import Seen
    from vlmix.evals.diagnostics._subject import Subject

EXAMPLES = 3
_VIEWS = 4
"""More views of one picture are not drawn."""


@torch.inference_mode()
def window_weights(fusion: Any, low: FeatureMap, high: FeatureMap) -> Float[Tensor, "i e n m"]:
    """What each head of each query gives to the keys of its window: they sum to 1 over M.

    ``fusion`` is patch mining. In the published form softmax(q k / sqrt(width)), in float32; the keys of all
    windows are made.
    """
    query_INEC = fusion.query(low.tokens).unflatten(-1, (fusion.heads, -1)).float()
    key_INMEC = fusion.key(high.windows(fusion.window)).unflatten(-1, (fusion.heads, -1)).float()
    scores_IENM = torch.einsum("inec,inmec->ienm", query_INEC, key_INMEC) * query_INEC.shape[-1] ** -0.5
    return scores_IENM.softmax(-1)


def laid_out(weights_INM: Tensor, grid: Grid, window: Grid) -> Float[Tensor, "i h w"]:
    """Weights of every window where their keys lie in the map."""
    x_IGWPQ = weights_INM.unflatten(2, window).unflatten(1, grid)
    return x_IGWPQ.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def evenness(weights_IENM: Tensor) -> float:
    """Mean entropy of the windows over the largest: 1 where all keys count alike, 0 where one does."""
    keys = weights_IENM.shape[-1]
    return float(torch.special.entr(weights_IENM.double()).sum(-1).mean()) / math.log(keys)


@DIAGNOSTICS.register("mining_windows")
class MiningWindows(Diagnostic):
    """Window maps of a few pictures, one for each task, and the evenness of all windows by task."""

    def obstacle(self, subject: Subject) -> str:
        """There are windows with something to choose only in patch mining."""
        fusion = subject.model.model.fusion
        if not isinstance(fusion, PatchMining):
            kind = subject.model.config.fusion_settings().kind
            return f"Only patch_mining has windows; the fusion of this model is {kind}."
        if fusion.window == (1, 1):
            return "Every window holds one cell, so there is nothing to choose."
        return ""

    def examine(self, subject: Subject) -> Finding:
        """Weights of every question's first pictures; the first of each task is drawn."""
        found: dict[str, list[float]] = {}
        fusion: Any = subject.model.model.fusion
        figures: list[Figure] = []
        for sample, seen in subject.seen(subject.samples):
            weights_IENM = _weights(fusion, seen)
            if sample.task not in found and len(figures) < EXAMPLES:
                figures.append(
                    _drawn(fusion, sample, seen, weights_IENM, f"mining_windows-{len(figures) + 1}")
                )
            found.setdefault(sample.task, []).append(evenness(weights_IENM))
        means = {task: sum(values) / len(values) for task, values in sorted(found.items())}
        every = [value for values in found.values() for value in values]
        rows = [
            [task or "(no task)", number(means[task]), str(len(values))]
            for task, values in sorted(found.items())
        ]
        keys = math.prod(fusion.window)
        return Finding(
            title="Windows of patch mining",
            reading=(
                f"Each token of the first encoder weighs the {keys} cells of its window in the second map. "
                "Evenness 1: it takes their mean and looks nowhere in particular; 0: it takes one cell. "
                "In the pictures 1 is an even share, heads are averaged, and white lines part windows.",
            ),
            tables=[Table("evenness of the windows", ("task", "evenness", "questions"), rows)],
            figures=figures,
            data={
                "window": list(fusion.window),
                "evenness": rounded(sum(every) / len(every)) if every else None,
                "tasks": {task: rounded(value) for task, value in means.items()},
            },
        )


def _weights(fusion: Any, seen: Seen) -> Tensor:
    low, high = cast("Sequence[FeatureMap]", seen.maps)
    return window_weights(fusion, low, high)


def _drawn(fusion: Any, sample: Sample, seen: Seen, weights_IENM: Tensor, name: str) -> Figure:
    low = cast("FeatureMap", seen.maps[0])
    keys = weights_IENM.shape[-1]
    heat_IHW = laid_out(weights_IENM.mean(1), low.grid, fusion.window).cpu() * keys
    shown = seen.views.float().cpu()
    shown = shown / 255 if not seen.views.is_floating_point() else shown
    views = list(zip(shown[:_VIEWS], heat_IHW[:_VIEWS], strict=True))
    question = question_of(sample).turns[-1].text.strip()
    return Figure(name, windows_picture(views, low.grid), f"{sample.id}: {question}")
