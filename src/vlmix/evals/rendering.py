"""The report as one HTML page: everything inside, nothing fetched, no script, all foreign text escaped.

This file decides what is shown and where on a scale of 0..100 it lies; ``page/`` says how it looks.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vlmix.evals.curves import Curve, thinned, ticks
from vlmix.evals.forgetting import ForgettingMatrix, heatmap
from vlmix.evals.gallery import Card, pick_cards
from vlmix.evals.routing import RoutingReport
from vlmix.evals.run import EvalResult, Outcome
from vlmix.evals.statistics import Interval

_PAGE = Path(__file__).parent / "page"
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 434.0, 10.0, 170.0  # the plot within a picture of 440 x 200


@dataclass(frozen=True, slots=True)
class Bar:
    """One value with its interval, in percent; ``kind`` chooses the colour."""

    label: str
    kind: str
    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True)
class Row:
    """One task or figure: the model's bar, and the controls on the same questions."""

    bar: Bar
    blind: Bar | None
    majority: Bar


@dataclass(frozen=True, slots=True)
class Measure:
    """A figure that is no share of 1, with its interval, in its own unit."""

    label: str
    value: float
    low: float
    high: float
    unit: str


@dataclass(frozen=True, slots=True)
class ForgettingView:
    """The forgetting matrix under both means, heading first, and its picture."""

    harmonic: Sequence[Sequence[str]]
    arithmetic: Sequence[Sequence[str]]
    picture: str


@dataclass(frozen=True, slots=True)
class ResultView:
    """One benchmark as the page shows it."""

    name: str
    headline: str
    n: int
    failed: int
    groups: int
    method: str
    bars: Sequence[Bar]
    has_blind: bool
    figures: Sequence[Row]
    measures: Sequence[Measure]
    tasks: Sequence[Row]
    wrong: Sequence[Card]
    right: Sequence[Card]
    settings: str


@dataclass(frozen=True, slots=True)
class Tick:
    """A grid line of a chart: where it is drawn and what it says."""

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a chart: legend, and points as SVG writes them."""

    name: str
    points: str


@dataclass(frozen=True, slots=True)
class CurveView:
    """One chart, placed."""

    title: str
    x_label: str
    lines: Sequence[Line]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]


def render_page(  # noqa: PLR0913  (each is a part of the page)
    title: str,
    results: Sequence[EvalResult],
    *,
    curves: Sequence[Curve] = (),
    recipe_text: str = "",
    notes: Sequence[str] = (),
    gallery: int = 12,
    routing: RoutingReport | None = None,
    forgetting: ForgettingMatrix | None = None,
) -> str:
    """The page as text; the same arguments give the same page."""
    environment = Environment(
        loader=FileSystemLoader(_PAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.jinja").render(
        title=title,
        css=(_PAGE / "report.css").read_text(encoding="utf-8"),
        results=[_result_view(result, gallery) for result in results],
        curves=[_curve_view(curve) for curve in curves if any(series.points for series in curve.series)],
        recipe_text=recipe_text,
        notes=notes,
        routing=routing,
        forgetting=None if forgetting is None else _forgetting_view(forgetting),
        versions=dict(results[0].versions) if results else {},
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate in an answer must not stop it


def _forgetting_view(matrix: ForgettingMatrix) -> ForgettingView:
    picture = base64.b64encode(heatmap(matrix)).decode()
    return ForgettingView(matrix.table("harmonic"), matrix.table("arithmetic"), picture)


def _result_view(result: EvalResult, gallery: int) -> ResultView:
    model, name = result.model, result.headline
    bars = [_bar("The model", "model", model.intervals[name])]
    if result.blind is not None:
        bars.append(_bar("Blind: pictures exchanged", "blind", result.blind.intervals[name]))
    bars += [
        _bar("Commonest answer of each task", "majority", result.majority_by_task.intervals[name]),
        _bar("Commonest answer of all", "majority", result.majority.intervals[name]),
    ]
    wrong, right = pick_cards(result, gallery)
    settings = {"settings": result.settings, "decoding": asdict(result.decoding), "seed": result.seed}
    return ResultView(
        name=result.benchmark,
        headline=name,
        n=len(result.samples),
        failed=model.failed,
        groups=model.intervals[name].groups,
        method=model.intervals[name].method,
        bars=bars,
        has_blind=result.blind is not None,
        figures=[row for row in _rows(result, _figures_of) if row.bar.label not in {name, *result.units}],
        measures=[_measure(label, unit, model.intervals[label]) for label, unit in result.units.items()],
        tasks=_rows(result, _tasks_of),
        wrong=wrong,
        right=right,
        settings=json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False),
    )


def _figures_of(outcome: Outcome) -> Mapping[str, Interval]:
    return outcome.intervals


def _tasks_of(outcome: Outcome) -> Mapping[str, Interval]:
    return outcome.tasks


def _rows(result: EvalResult, of: Callable[[Outcome], Mapping[str, Interval]]) -> list[Row]:
    blind, majority = of(result.blind) if result.blind else {}, of(result.majority_by_task)
    return [
        Row(
            _bar(name or "(no task)", "model", interval),
            _bar(name, "blind", blind[name]) if name in blind else None,
            _bar(name, "majority", majority[name]),
        )
        for name, interval in of(result.model).items()
    ]


def _measure(label: str, unit: str, interval: Interval) -> Measure:
    return Measure(label, interval.value, interval.low, interval.high, unit)


def _bar(label: str, kind: str, interval: Interval) -> Bar:
    value, low, high = (round(100 * end, 3) for end in (interval.value, interval.low, interval.high))
    return Bar(label, kind, value, low, high, interval.n)


def _curve_view(curve: Curve) -> CurveView:
    points = [point for series in curve.series for point in series.points]
    x_at = ticks(min(x for x, _ in points), max(x for x, _ in points), 5)
    y_at = ticks(min(0.0, *(y for _, y in points)), max(y for _, y in points))

    def across(x: float) -> float:
        return round(_LEFT + (_RIGHT - _LEFT) * (x - x_at[0]) / (x_at[-1] - x_at[0]), 1)

    def down(y: float) -> float:
        return round(_BOTTOM - (_BOTTOM - _TOP) * (y - y_at[0]) / (y_at[-1] - y_at[0]), 1)

    return CurveView(
        title=curve.title,
        x_label=curve.x_label,
        lines=[
            Line(series.name, " ".join(f"{across(x)},{down(y)}" for x, y in thinned(series.points)))
            for series in curve.series
        ],
        x_ticks=[Tick(across(x), f"{x:g}") for x in x_at],
        y_ticks=[Tick(down(y), f"{y:g}") for y in y_at],
    )
