"""The diagnostics' pictures as PNG; the same numbers give the same bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from torch import Tensor

from vlmix.core.tensors import Grid
from vlmix.evals.statistics import Interval

_COLOURS = ("#2457c5", "#c05f14", "#1a7f45", "#8a3fb0", "#b3245f", "#5b6b00")


def rates_picture(groups: Mapping[str, Sequence[Interval | None]], names: Sequence[str]) -> bytes:
    """One dot with its interval, in percent, for each encoder in every group of questions."""
    figure = Canvas(figsize=(8, 1.4 + 0.22 * len(groups) * (len(names) + 1)), layout="constrained")
    axes = _axes(figure)
    step = len(names) + 1
    for number, name in enumerate(names):
        at, middle, below, above = [], [], [], []
        for place, rates in enumerate(groups.values()):
            rate = rates[number]
            if rate is not None:
                at.append(place * step + number)
                middle.append(100 * rate.value)
                below.append(100 * (rate.value - rate.low))
                above.append(100 * (rate.high - rate.value))
        colour = _COLOURS[number % len(_COLOURS)]
        axes.errorbar(middle, at, xerr=(below, above), fmt="o", markersize=4, color=colour, label=name)
    axes.axvline(0, color="#7b7f88", linewidth=1)
    axes.set_yticks([place * step + (len(names) - 1) / 2 for place in range(len(groups))], labels=[*groups])
    axes.set_ylim(len(groups) * step - 1, -1)
    axes.set_xlabel("u in percent of the accuracy with all encoders")
    axes.legend(fontsize=8)
    return _png(figure)


def curves_picture(curves: Mapping[str, Sequence[Interval]]) -> bytes:
    """One line for each model over the number of encoders kept, its intervals as a band."""
    figure = Canvas(figsize=(6, 3.6), layout="constrained")
    axes = _axes(figure)
    for number, (name, found) in enumerate(curves.items()):
        x, colour = range(len(found)), _COLOURS[number % len(_COLOURS)]
        axes.plot(x, [100 * one.value for one in found], marker="o", color=colour, label=name)
        low, high = [100 * one.low for one in found], [100 * one.high for one in found]
        axes.fill_between(x, low, high, color=colour, alpha=0.15)
    axes.set_xticks(range(max(len(found) for found in curves.values())))
    axes.set_xlabel("encoders kept")
    axes.set_ylabel("mean score in percent")
    axes.legend(fontsize=8)
    return _png(figure)


def matrix_picture(values: Sequence[Sequence[float | None]], names: Sequence[str]) -> bytes:
    """A square of numbers in 0..1."""
    side = 1.8 + 0.8 * len(names)
    figure = Canvas(figsize=(side + 0.6, side), layout="constrained")
    axes = _axes(figure)
    shown = [[math.nan if value is None else value for value in row] for row in values]
    axes.imshow(shown, vmin=0, vmax=1, cmap="viridis")
    axes.set_xticks(range(len(names)), labels=[*names], rotation=30, ha="right")
    axes.set_yticks(range(len(names)), labels=[*names])
    for down, row in enumerate(values):
        for across, value in enumerate(row):
            if value is not None:
                colour = "k" if value > 0.6 else "w"
                axes.text(across, down, f"{value:.2f}", ha="center", va="center", color=colour)
    return _png(figure)


def windows_picture(views: Sequence[tuple[Tensor, Tensor]], grid: Grid) -> bytes:
    """Each view (3, S, S) in 0..1 beside itself under its weights (H, W); lines part the windows of ``grid``.

    A weight of 1 is an even share of its window.
    """
    figure = Canvas(figsize=(7, 3.3 * len(views)), layout="constrained")
    FigureCanvasAgg(figure)
    most = max(float(heat_HW.max()) for _, heat_HW in views)
    for row, (view_3SS, heat_HW) in enumerate(views):
        picture = view_3SS.permute(1, 2, 0).numpy()
        for column in range(2):
            axes: Any = figure.add_subplot(len(views), 2, 2 * row + column + 1)
            # Under the weights the picture is grey, so that its colours are not taken for theirs.
            shown = picture.mean(-1) if column else picture
            axes.imshow(shown, extent=(0, 1, 1, 0), cmap="gray", vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
            if column:
                drawn = axes.imshow(
                    heat_HW.numpy(), extent=(0, 1, 1, 0), cmap="magma", vmin=0, vmax=most, alpha=0.65
                )
                _lines(axes, grid)
                figure.colorbar(drawn, ax=axes, label="weight over an even share", shrink=0.9)
    return _png(figure)


def _lines(axes: Any, grid: Grid) -> None:
    rows, columns = grid
    for place in range(1, rows):
        axes.axhline(place / rows, color="w", linewidth=0.4)
    for place in range(1, columns):
        axes.axvline(place / columns, color="w", linewidth=0.4)


def _axes(figure: Canvas) -> Any:
    FigureCanvasAgg(figure)
    return figure.add_subplot()


def _png(figure: Canvas) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120, metadata={"Software": None})
    return out.getvalue()
