"""The report as one HTML page: everything inside, nothing fetched, no script, all foreign text escaped.

This file decides what is shown and where on a scale of 0..100 it lies; ``page/`` says how it looks.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vlmix.evals.cost import RunCost
from vlmix.evals.curves import Curve, thinned, ticks
from vlmix.evals.forgetting import ForgettingMatrix, heatmap
from vlmix.evals.gallery import Card, pick_cards
from vlmix.evals.jackknife import UNDETERMINED, whole_of
from vlmix.evals.routing import RoutingReport
from vlmix.evals.run import EvalResult, Outcome
from vlmix.evals.statistics import Interval

NOT_DETERMINED = "not determined"
_PAGE = Path(__file__).parent / "page"
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 434.0, 10.0, 170.0  # the plot within a picture of 440 x 200


@dataclass(frozen=True, slots=True)
class Bar:
    """One value with its interval, in percent of the scale it is drawn on; ``kind`` chooses the colour.

    ``text`` and ``ends`` say them in their own unit.
    """

    label: str
    kind: str
    value: float
    low: float
    high: float
    n: int
    text: str
    ends: str


@dataclass(frozen=True, slots=True)
class Row:
    """One task or figure: the model's bar, and the controls on the same questions, in percent."""

    bar: Bar
    blind: float | None
    majority: float | None


@dataclass(frozen=True, slots=True)
class Measure:
    """A figure that is no share of 1, with its interval, in its own unit."""

    label: str
    value: str
    ends: str
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
    unit: str
    scale: Sequence[str]
    protocol: str
    source: str
    n: int
    failed: int
    states: Mapping[str, int]
    unasked: Sequence[str]
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
    cost: RunCost | None


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
    costs: Sequence[RunCost] = (),
) -> str:
    """The page as text; the same arguments give the same page."""
    return filled(
        "report.html.jinja",
        title=title,
        results=[
            _result_view(result, gallery, cost)
            for result, cost in zip_longest(results, costs[: len(results)])
        ],
        curves=[_curve_view(curve) for curve in curves if any(series.points for series in curve.series)],
        recipe_text=recipe_text,
        notes=notes,
        routing=routing,
        forgetting=None if forgetting is None else _forgetting_view(forgetting),
        versions=dict(results[0].versions) if results else {},
    )


def filled(template: str, **parts: object) -> str:
    """A page of ``page/`` with its parts put in; all text is escaped."""
    environment = Environment(
        loader=FileSystemLoader(_PAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    css = (_PAGE / "report.css").read_text(encoding="utf-8")
    page = environment.get_template(template).render(css=css, **parts)
    return page.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate in an answer must not stop it


def _forgetting_view(matrix: ForgettingMatrix) -> ForgettingView:
    picture = base64.b64encode(heatmap(matrix)).decode()
    return ForgettingView(matrix.table("harmonic"), matrix.table("arithmetic"), picture)


def _result_view(result: EvalResult, gallery: int, cost: RunCost | None) -> ResultView:
    model, name = result.model, result.headline
    unit = result.units.get(name, "")
    controls = [("Commonest answer of each task", result.majority_by_task)]
    controls.append(("Commonest answer of all", result.majority))
    bars = [("The model", "model", model.intervals[name])]
    if result.blind is not None:
        bars.append(("Blind: pictures exchanged", "blind", result.blind.intervals[name]))
    bars += [(label, "majority", outcome.intervals[name]) for label, outcome in controls]
    top = whole_of(unit) or ticks(0.0, max(interval.high for _, _, interval in bars))[-1]
    wrong, right = pick_cards(result, gallery)
    settings = {"settings": result.settings, "decoding": asdict(result.decoding), "seed": result.seed}
    others = {key: value for key, value in model.intervals.items() if key != name}
    shares = {key: whole for key in others if (whole := whole_of(result.units.get(key, "")))}
    return ResultView(
        name=result.benchmark,
        headline=name,
        unit="%" if whole_of(unit) else unit,
        scale=[f"{part * (100 if whole_of(unit) else top) / 4:g}" for part in range(5)],
        protocol=result.protocol,
        source=result.source,
        n=len(result.samples),
        failed=model.failed,
        states=dict(sorted(Counter(score.state for score in model.scores).items())),
        unasked=[sample.defect for sample in result.samples if sample.defect],
        groups=model.intervals[name].groups,
        method=model.intervals[name].method,
        bars=[_bar(label, kind, interval, top, share=bool(whole_of(unit))) for label, kind, interval in bars],
        has_blind=result.blind is not None,
        figures=[_figure_row(result, key, whole) for key, whole in shares.items()],
        measures=[
            Measure(key, *_told(value), result.units[key])
            for key, value in others.items()
            if key not in shares
        ],
        tasks=_task_rows(result),
        wrong=wrong,
        right=right,
        settings=json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False),
        cost=cost,
    )


def _figure_row(result: EvalResult, name: str, whole: float) -> Row:
    def percent(outcome: Outcome | None) -> float | None:
        found = None if outcome is None else outcome.figures.get(name)
        return None if found is None else round(100 * found / whole, 3)

    bar = _bar(name, "model", result.model.intervals[name], whole)
    return Row(bar, percent(result.blind), percent(result.majority_by_task))


def _task_rows(result: EvalResult) -> list[Row]:
    def percent(outcome: Outcome | None, task: str) -> float | None:
        found = None if outcome is None else outcome.tasks.get(task)
        return None if found is None else round(100 * found.value, 3)

    return [
        Row(
            _bar(task or "(no task)", "model", interval),
            percent(result.blind, task),
            percent(result.majority_by_task, task),
        )
        for task, interval in result.model.tasks.items()
    ]


def _bar(label: str, kind: str, interval: Interval, top: float = 1.0, *, share: bool = True) -> Bar:
    """A bar on a scale from 0 to ``top``; a share is told in percent."""
    value, low, high = (
        round(min(100.0, max(0.0, 100 * end / top)), 3)
        for end in (interval.value, interval.low, interval.high)
    )
    if not share:
        return Bar(label, kind, value, low, high, interval.n, *_told(interval))
    ends = NOT_DETERMINED if interval.method == UNDETERMINED else f"{low:.1f} to {high:.1f}"
    return Bar(label, kind, value, low, high, interval.n, f"{value:.1f}", ends)


def _told(interval: Interval) -> tuple[str, str]:
    """A figure and its ends in their own unit: points of hundreds need no thousandth."""
    digits = 1 if max(abs(interval.value), abs(interval.high)) >= 100 else 3
    value, low, high = (f"{each:.{digits}f}" for each in (interval.value, interval.low, interval.high))
    return value, NOT_DETERMINED if interval.method == UNDETERMINED else f"{low} to {high}"


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
