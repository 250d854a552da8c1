"""What a model still knows of earlier tasks: the matrix of accuracies, forgetting, and the two means.

Accuracies are points, 0..100. omega_t(k) is the mean over task t's benchmarks once task k was learnt; task 1
is what the model could do before the first. Delta_t(k) = omega_t(1) - omega_t(k): above 0 something was
forgotten. The paper's mean is harmonic, with zeros raised to ``FLOOR``, so one benchmark at zero decides all;
the arithmetic mean stands beside it. Paper: arXiv:2410.19925, section 4.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vlmix.core.errors import InputError
from vlmix.core.files import read_json, write_bytes, write_json

FLOOR: Final = 0.1
Mean = Literal["harmonic", "arithmetic"]


def arithmetic_mean(points: Iterable[float]) -> float:
    """The ordinary mean.

    Raises:
        InputError: if there is nothing to average.

    """
    found = _some(points)
    return sum(found) / len(found)


def harmonic_mean(points: Iterable[float], floor: float = FLOOR) -> float:
    """The number of accuracies over the sum of their inverses, each raised to ``floor`` first.

    Raises:
        InputError: if there is nothing to average, or the floor is not above 0.

    """
    if floor <= 0:
        raise InputError(f"the floor of a harmonic mean must be above 0, it is {floor}")
    found = _some(points)
    return len(found) / sum(1 / max(each, floor) for each in found)


def mean(points: Iterable[float], kind: Mean = "harmonic") -> float:
    """One of the two."""
    return harmonic_mean(points) if kind == "harmonic" else arithmetic_mean(points)


def forgetting(before: float, after: float) -> float:
    """Delta: points lost; below 0 where they were gained."""
    return before - after


def relative_forgetting(base: float, model: float) -> float:
    """Delta' = 100 (base - model) / base: the share of what the base could do that is lost, in percent.

    Raises:
        InputError: if the base could do nothing.

    """
    if base <= 0:
        raise InputError("forgetting relative to a base of 0 points has no meaning")
    return 100 * (base - model) / base


@dataclass(frozen=True, slots=True)
class ForgettingMatrix:
    """Points on every benchmark after each task.

    ``benchmarks`` names those of each task, in the order of training; the first task is the language that was
    there before. ``points`` has a row after each task, the first before any training.
    """

    benchmarks: Mapping[str, tuple[str, ...]]
    points: tuple[Mapping[str, float], ...]

    def __post_init__(self) -> None:
        names = [name for group in self.benchmarks.values() for name in group]
        if not self.points or len(self.points) > len(self.benchmarks):
            raise InputError(f"{len(self.points)} rows of points for {len(self.benchmarks)} tasks")
        for number, row in enumerate(self.points, start=1):
            if missing := sorted({*names} - {*row}):
                raise InputError(f"after task {number} there are no points for {', '.join(missing)}")

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names in order."""
        return tuple(self.benchmarks)

    def omega(self, task: str, after: int, kind: Mean = "harmonic") -> float:
        """omega_t(k): the mean over the benchmarks of ``task`` after ``after`` tasks, counted from 1."""
        return mean((self._row(after)[name] for name in self.benchmarks[task]), kind)

    def delta(self, task: str, after: int, kind: Mean = "harmonic") -> float:
        """Delta_t(k) = omega_t(1) - omega_t(k)."""
        return forgetting(self.omega(task, 1, kind), self.omega(task, after, kind))

    def lost(self, task: str, after: int, kind: Mean = "harmonic") -> float:
        """Points lost since the task itself was learnt: omega_t(t) - omega_t(k)."""
        return forgetting(self.omega(task, self.tasks.index(task) + 1, kind), self.omega(task, after, kind))

    def relative(self, task: str, after: int, kind: Mean = "harmonic") -> float:
        """Delta' of a task: percent of omega_t(1) that is lost."""
        return relative_forgetting(self.omega(task, 1, kind), self.omega(task, after, kind))

    def learnt(self, after: int, kind: Mean = "harmonic") -> float:
        """The mean over the benchmarks of all tasks learnt so far, without the first: the VL average.

        Raises:
            InputError: if none was learnt yet.

        """
        names = [name for task in self.tasks[1:after] for name in self.benchmarks[task]]
        return mean((self._row(after)[name] for name in names), kind)

    def _row(self, after: int) -> Mapping[str, float]:
        if not 1 <= after <= len(self.points):
            raise InputError(f"after task {after}: there are points after tasks 1 to {len(self.points)}")
        return self.points[after - 1]

    def to_json(self) -> dict[str, Any]:
        """Everything above by task, for ``forgetting.json``."""
        rounds = range(1, len(self.points) + 1)
        first = self.tasks[0]
        return {
            "tasks": list(self.tasks),
            "benchmarks": {task: list(names) for task, names in self.benchmarks.items()},
            "points": [dict(row) for row in self.points],
            "floor": FLOOR,
            "means": {
                kind: {
                    "omega": {task: [self.omega(task, k, kind) for k in rounds] for task in self.tasks},
                    "delta": [self.delta(first, k, kind) for k in rounds],
                    "learnt": [self.learnt(k, kind) for k in rounds if k > 1],
                }
                for kind in ("harmonic", "arithmetic")
            },
        }

    def table(self, kind: Mean = "harmonic") -> list[list[str]]:
        """Rows of text, heading first: after which task, each task's points, the VL average and Delta."""
        rows = [["after", *self.tasks, "learnt", f"Δ {self.tasks[0]}"]]
        for k in range(1, len(self.points) + 1):
            points = [f"{self.omega(task, k, kind):.1f}" for task in self.tasks]
            learnt = f"{self.learnt(k, kind):.1f}" if k > 1 else ""
            rows.append([self.tasks[k - 1], *points, learnt, f"{self.delta(self.tasks[0], k, kind):.1f}"])
        return rows


def read_matrix(path: Path) -> ForgettingMatrix:
    """A matrix from accuracies measured elsewhere: a CSV file, or JSON such as ``forgetting.json``.

    CSV columns are ``after`` and one ``TASK/BENCHMARK`` for each benchmark, tasks in the order they were
    learnt; rows are in that order too, the first before any training. JSON has ``tasks`` in order, the
    ``benchmarks`` of each, and a row of ``points`` by benchmark after each.

    Raises:
        InputError: if the file does not say so; names what is wrong.

    """
    try:
        benchmarks, points = _from_csv(path) if path.suffix == ".csv" else _from_json(read_json(path))
        rows = tuple({name: float(value) for name, value in row.items()} for row in points)
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} holds no matrix of points: {type(error).__name__} {error}") from None
    return ForgettingMatrix(benchmarks, rows)


def _from_json(raw: Any) -> tuple[dict[str, tuple[str, ...]], Sequence[Mapping[str, Any]]]:
    return {task: tuple(raw["benchmarks"][task]) for task in raw["tasks"]}, list(raw["points"])


def _from_csv(path: Path) -> tuple[dict[str, tuple[str, ...]], Sequence[Mapping[str, Any]]]:
    with path.open(encoding="utf-8", newline="") as file:
        after, *columns = next(csv.reader(file), ("",))
        rows = [row for row in csv.reader(file) if row]
    if after != "after" or any(column.count("/") != 1 for column in columns):
        raise ValueError("its first line must be `after` and one TASK/BENCHMARK for each benchmark")
    found: dict[str, tuple[str, ...]] = {}
    for column in columns:
        task = column.partition("/")[0]
        found[task] = (*found.get(task, ()), column)
    points = [dict(zip(columns, row[1:], strict=True)) for row in rows]
    if [row[0] for row in rows] != list(found)[: len(points)]:
        raise ValueError(f"its rows must be after {', '.join(found)}, in this order")
    return found, points


def heatmap(matrix: ForgettingMatrix, kind: Mean = "harmonic") -> bytes:
    """The matrix as a PNG: a row after each task, a column for each; what is not learnt yet is pale."""
    rounds, tasks = len(matrix.points), matrix.tasks
    values = [[matrix.omega(task, k, kind) for task in tasks] for k in range(1, rounds + 1)]
    figure = Figure(figsize=(1.6 + 1.1 * len(tasks), 1.3 + 0.6 * rounds), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    opacity = [[1.0 if place <= k else 0.35 for place in range(len(tasks))] for k in range(rounds)]
    axes.imshow(values, vmin=0, vmax=100, cmap="viridis", alpha=opacity, aspect="auto")
    axes.set_xticks(range(len(tasks)), labels=[*tasks])
    axes.set_yticks(range(rounds), labels=[*tasks[:rounds]])
    axes.set_xlabel(f"points on ({kind} mean of its benchmarks)")
    axes.set_ylabel("after learning")
    for k, row in enumerate(values):
        for place, value in enumerate(row):
            dark = value < 60 and place <= k
            axes.text(place, k, f"{value:.1f}", ha="center", va="center", color="w" if dark else "k")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120, metadata={"Software": None})
    return out.getvalue()


def write_forgetting(folder: Path, matrix: ForgettingMatrix) -> None:
    """Write ``forgetting.json`` and ``forgetting.png`` into an existing folder."""
    write_json(folder / "forgetting.json", matrix.to_json())
    write_bytes(folder / "forgetting.png", heatmap(matrix))


def _some(points: Iterable[float]) -> Sequence[float]:
    found = list(points)
    if not found:
        raise InputError("a mean of no points at all")
    if wrong := [each for each in found if not 0 <= each <= 100]:
        raise InputError(f"accuracies are points from 0 to 100, got {wrong[0]}")
    return found
