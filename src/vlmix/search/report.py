"""What a search leaves for people and programs: search.json, search.md and search.html in its folder."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vlmix.core.files import write_json, write_text
from vlmix.evals.pareto import Priced, frontier, pareto_picture
from vlmix.search.costs import Account, account, naive_seconds
from vlmix.search.evidence import Estimate, Evidence
from vlmix.search.ledger import Entry, Ledger
from vlmix.search.points import Point
from vlmix.search.settings import Grid
from vlmix.search.strategies._base import Found, Step
from vlmix.search.verify import Check

SCHEMA = "vlmix.search/1"
_PAGE: Final = Path(__file__).parent / "page"
_AXES: Final = {"flops": "FLOPs of a prompt", "tokens": "visual tokens", "seconds": "seconds of a trial"}


@dataclass(frozen=True, slots=True)
class Row:
    """One choice: its objective, and the means of cost over its seeds; ``naive`` seconds share nothing."""

    point: Point
    estimate: Estimate
    cost: Mapping[str, float]
    naive: float
    error: str
    pareto: tuple[str, ...]
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """A finished search: where it ended and why, every choice, and what all of it cost."""

    grid: Grid
    found: Found
    rows: tuple[Row, ...]
    entries: tuple[Entry, ...]
    cost: Account
    checks: tuple[Check, ...]

    @staticmethod
    def of(
        grid: Grid,
        found: Found,
        evidence: Evidence,
        ledger: Ledger,
        entries: Sequence[Entry],
        start: float,
        checks: Sequence[Check],
    ) -> Summary:
        """Bring together what strategy, trials and ledger know."""
        made = ledger.made()
        bare = {point: evidence.estimate(point) for point in evidence.keys}
        costs = {point: _mean_cost(evidence.entries_of(point)) for point in evidence.keys}
        best_on = {
            axis: frontier([_priced(p.label, costs[p], axis, found) for p, found in bare.items()])
            for axis in _AXES
        }
        rows = [
            Row(
                point=point,
                estimate=estimate,
                cost=costs[point],
                naive=_mean([naive_seconds(entry, made) for entry in evidence.entries_of(point)]),
                error=next((entry.error for entry in evidence.entries_of(point) if entry.error), ""),
                pareto=tuple(a for a, best in best_on.items() if point.label in {run.name for run in best}),
                keys=evidence.keys[point],
            )
            for point, estimate in bare.items()
        ]
        whole = account(entries, made, start)
        return Summary(grid, found, tuple(rows), tuple(entries), whole, tuple(checks))

    @property
    def best(self) -> Row:
        """The choice that the search ended with."""
        return next(row for row in self.rows if row.point == self.found.best)

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        cost = {**asdict(self.cost), "ratio": self.cost.ratio, "checks": [asdict(c) for c in self.checks]}
        return {
            "schema": SCHEMA,
            "grid": self.grid.model_dump(mode="json", exclude={"recipe"}),
            "best": {**self.found.best.to_json(), "trials": list(self.best.keys)},
            "path": [_step(step) for step in self.found.path],
            "notes": list(self.found.notes),
            "choices": [_row(row) for row in self.rows],
            "trials": [entry.model_dump(mode="json") for entry in self.entries],
            "cost": cost,
        }


def write_summary(out: Path, summary: Summary) -> None:
    """Write the three files, each whole.

    Raises:
        DiskFullError: if there is no room.

    """
    write_json(out / "search.json", summary.to_json())
    pictures = [(label, _picture(summary, axis, label)) for axis, label in _AXES.items()]
    page = Environment(
        loader=FileSystemLoader(_PAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    words = {
        "spread": spread,
        "cost_sentence": cost_sentence,
        "check_sentence": check_sentence,
        "cost_cells": cost_cells,
    }
    view = {"summary": summary, "pictures": pictures, "steps": summary.found.path, **words}
    html = page.get_template("search.html.jinja").render(**view)
    write_text(out / "search.html", html.encode("utf-8", "replace").decode("utf-8"))
    write_text(out / "search.md", as_markdown(summary))


def as_markdown(summary: Summary) -> str:
    """The same in Markdown."""
    cost, lines = summary.cost, [f"# {summary.grid.name}", ""]
    lines += [f"Best: **{_cell(summary.found.best.label)}**, objective {spread(summary.best.estimate)}", ""]
    lines += [f"- {_cell(note)}" for note in summary.found.notes] + [""]
    lines += [
        "| | choice | objective | FLOPs | tokens | seconds | alone | unbeaten by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for number, row in enumerate(summary.rows, 1):
        cells = [_cell(row.point.label), _cell(row.error) or spread(row.estimate), *cost_cells(row)]
        lines.append(f"| {number} | {' | '.join(cells)} | {', '.join(row.pareto)} |")
    lines += ["", "| decision | over | gain | taken |", "|---|---|---|---|"]
    for step in summary.found.path:
        over = "" if step.over is None else _cell(step.over.label)
        why = "" if step.gain is None else step.gain.why
        lines.append(f"| {_cell(step.point.label)} | {over} | {why} | {'yes' if step.taken else 'no'} |")
    lines += ["", cost_sentence(cost), *(check_sentence(check) for check in summary.checks), ""]
    return "\n".join(lines)


def cost_cells(row: Row) -> list[str]:
    """FLOPs, tokens, seconds, and seconds alone; empty where the choice could not be trained."""
    told = [row.cost[name] for name in ("flops", "tokens", "seconds") if name in row.cost]
    return [f"{value:.4g}" for value in (*told, row.naive)] if told else [""] * 4


def cost_sentence(cost: Account) -> str:
    """What sharing saved, in words."""
    return (
        f"{cost.reuse:.0f} s with shared pieces, {cost.naive:.0f} s if every trial had made its own "
        f"({cost.ratio:.0%}); {cost.pieces} pieces were taken {cost.taken} times. What all trials begin with "
        f"took {cost.start:.0f} s and counts once in both."
    )


def check_sentence(check: Check) -> str:
    """What a trial that was run alone showed, in words."""
    same = "the same figures" if check.same else "OTHER FIGURES"
    return (
        f"Run again, nothing shared, {check.label} took {check.measured:.0f} s (said: {check.said:.0f} s; "
        f"shared: {check.reused:.0f} s) and gave {same}."
    )


def spread(estimate: Estimate) -> str:
    """``0.71 [0.69, 0.73]``."""
    if not math.isfinite(estimate.value):
        return "failed"
    ends = (
        "" if estimate.low is None or estimate.high is None else f" [{estimate.low:.4g}, {estimate.high:.4g}]"
    )
    return f"{estimate.value:.4g}{ends}"


def _mean_cost(entries: Sequence[Entry]) -> dict[str, float]:
    done = [entry.cost for entry in entries if entry.cost]
    return {name: _mean([cost[name] for cost in done]) for name in (done[0] if done else {})}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _priced(label: str, cost: Mapping[str, float], axis: str, estimate: Estimate) -> Priced:
    return Priced(label, cost.get(axis, math.nan), estimate.value, estimate.low, estimate.high)


def _picture(summary: Summary, axis: str, label: str) -> str:
    """The objective against one cost as a data URI; numbers are those of the rows."""
    runs = [_priced(row.point.label, row.cost, axis, row.estimate) for row in summary.rows]
    picture = pareto_picture(summary.grid.name, runs, label, "objective")
    return "data:image/png;base64," + base64.b64encode(picture).decode()


def _row(row: Row) -> dict[str, Any]:
    value = row.estimate.value if math.isfinite(row.estimate.value) else None
    return {
        **row.point.to_json(),
        "objective": {"value": value, "low": row.estimate.low, "high": row.estimate.high},
        "seeds": list(row.estimate.seeds),
        "cost": dict(row.cost),
        "naive_seconds": row.naive,
        "pareto": list(row.pareto),
        "error": row.error,
        "trials": list(row.keys),
    }


def _step(step: Step) -> dict[str, Any]:
    gain = None
    if step.gain is not None:
        value = step.gain.value if math.isfinite(step.gain.value) else None
        gain = {"value": value, "low": step.gain.low, "high": step.gain.high, "why": step.gain.why}
    over = None if step.over is None else step.over.to_json()
    return {"choice": step.point.to_json(), "over": over, "gain": gain, "taken": step.taken}


def _cell(text: str) -> str:
    """Text that cannot end a cell of a table or begin markup."""
    safe = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return " ".join(safe.replace("`", "'").split())
