"""Score against cost: which runs no other run beats at the same price, as a picture."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Priced:
    """One run: what a question costs it, and its score, with the interval if there is one, in any unit."""

    name: str
    cost: float
    score: float
    low: float | None
    high: float | None

    @property
    def known(self) -> bool:
        """Whether there is a place for it; a run that failed has a cost or a score that is not finite."""
        return math.isfinite(self.cost) and math.isfinite(self.score)


def frontier(runs: Sequence[Priced]) -> list[Priced]:
    """The runs that no other beats: none as cheap scores as high, cheapest first, of equal ones one."""
    found: list[Priced] = []
    known = (run for run in runs if run.known)
    for run in sorted(known, key=lambda run: (run.cost, -run.score, run.name)):
        if not found or run.score > found[-1].score:
            found.append(run)
    return found


def pareto_picture(title: str, runs: Sequence[Priced], cost: str, score: str) -> bytes:
    """A PNG: a point with its interval for each known run, numbered as given, and the frontier as steps."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    best = frontier(runs)
    axes.step([run.cost for run in best], [run.score for run in best], where="post", color="#7b7f88", lw=1)
    known = [(number, run) for number, run in enumerate(runs, 1) if run.known]
    for number, run in known:
        low, high = (run.score if end is None else end for end in (run.low, run.high))
        ends = [[max(0.0, run.score - low)], [max(0.0, high - run.score)]]
        colour = "#2457c5" if run in best else "#c05f14"
        axes.errorbar(run.cost, run.score, yerr=ends, fmt="o", color=colour, capsize=3)
        axes.annotate(str(number), (run.cost, run.score), xytext=(6, 5), textcoords="offset points")
    costs = [run.cost for _, run in known]
    if costs and 0 < min(costs) < max(costs) / 20:
        axes.set_xscale("log")
    # A name from a file may hold what matplotlib would read as a formula.
    axes.set_title(title.replace("$", r"\$"), fontsize=11)
    axes.set_xlabel(cost)
    axes.set_ylabel(score.replace("$", r"\$"))
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120, metadata={"Software": None})
    return out.getvalue()
