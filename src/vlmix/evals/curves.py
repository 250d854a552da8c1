"""Training curves for the report: from metrics rows to lines, and from lines to points of a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from vlmix.core.errors import InputError
from vlmix.core.sample import Json

_POINTS = 240  # more than a line of this width can show


@dataclass(frozen=True, slots=True)
class Series:
    """One line: a name for the legend and its points (x, y)."""

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Curve:
    """One chart: a title and one or more lines over the same x axis."""

    title: str
    series: tuple[Series, ...]
    x_label: str = "step"


def read_curves(path: Path) -> list[Curve]:
    """The curves of a run's ``metrics.jsonl``; a last line that a crash cut short is left out.

    Raises:
        InputError: if the file cannot be read or another line is not JSON.

    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        return curves_of(json.loads(line) for line in lines if line.endswith("\n"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the metrics in {path}: {error}") from None


def curves_of(
    rows: Iterable[Mapping[str, Json]], names: Sequence[str] = ("loss", "lr", "balance")
) -> list[Curve]:
    """One chart for each of ``names`` from metrics rows ``{"step", "stage", name…}``, one line a stage.

    Where a stage counts its steps from the start again, it is put behind the stage before it. A row
    without the name adds no point to that chart; a chart without points is left out.
    """
    placed, offset, last = list[tuple[float, str, Mapping[str, Json]]](), 0.0, 0.0
    for row in rows:
        step = _number(row.get("step"))
        if step is None:
            continue
        if placed and str(row.get("stage", "")) != placed[-1][1] and offset + step <= last:
            offset = last
        last = offset + step
        placed.append((last, str(row.get("stage", "")), row))
    curves = [Curve(name, _lines(placed, name)) for name in names]
    return [curve for curve in curves if curve.series]


def _lines(rows: Sequence[tuple[float, str, Mapping[str, Json]]], name: str) -> tuple[Series, ...]:
    stages: dict[str, list[tuple[float, float]]] = {}
    for x, stage, row in rows:
        if (y := _number(row.get(name))) is not None:
            stages.setdefault(stage, []).append((x, y))
    return tuple(Series(stage or name, tuple(points)) for stage, points in stages.items())


def _number(value: Json) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def thinned(points: Sequence[tuple[float, float]], most: int = _POINTS) -> list[tuple[float, float]]:
    """At most ``most`` points: equal runs of neighbours are replaced by their mean."""
    if len(points) <= most:
        return list(points)
    edges = [round(i * len(points) / most) for i in range(most + 1)]
    runs = [points[a:b] for a, b in pairwise(edges)]
    return [
        (math.fsum(x for x, _ in run) / len(run), math.fsum(y for _, y in run) / len(run)) for run in runs
    ]


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers that enclose ``low``..``high``, ``about`` steps of 1, 2 or 5 times a power of ten."""
    size = max(abs(low), abs(high))
    rough = (high - low if high - low > 1e-4 * size else size or 1.0) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.10g}") for index in range(first, max(last, first + 1) + 1)]
