"""``vlmix search``: which encoders, which settings, and what each of them brings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from vlmix.cli.console import err, out
from vlmix.core.errors import UnknownNameError
from vlmix.search.grid_file import load_grid

if TYPE_CHECKING:
    from vlmix.search.report import Summary

_EXECUTORS = ("processes", "ray")


def search(
    grid: Annotated[
        str, typer.Argument(help="A grid file, or the name of one that `vlmix list grids` shows.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Settings of the grid to change, as key.path=value: seeds=[0,1]", show_default=False
        ),
    ] = None,
    out_dir: Annotated[
        Path | None,
        typer.Option("--out", help="Search folder; runs/search-NAME if left out.", show_default=False),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Trials that run at once.")] = 1,
    executor: Annotated[
        str, typer.Option("--executor", help="processes: on this machine. ray: on a Ray cluster.")
    ] = "processes",
) -> None:
    """Try mixtures of encoders, or values of settings, and say which is best and what it costs.

    A grid file names a base recipe, a pool of encoders or axes of settings, a strategy, and a formula to
    maximise over scores and cost:

        recipe: base.yaml

        strategy: {kind: round_robin}

        encoders: {clip: {kind: clip, …}, convnext: {kind: convnext, …}}

        objective: synth_qa.accuracy - 0.01 * cost.tokens / 576

        stop: {gain: 0.01}

    round_robin grows a mixture by the encoder that helps most until none helps enough; leave_one_out,
    anchor_plus_complement, exhaustive, grid and optuna are the others: `vlmix list strategies`.

    Every trial is a run in trials/ of the search folder. Encoders that are aligned alone, and what frozen
    ones see, are made once and shared. Stop it whenever you like: the same command goes on, and repeats no
    finished trial. The folder then holds search.html, search.md and search.json.
    """
    if executor not in _EXECUTORS:
        raise UnknownNameError("executor", executor, _EXECUTORS)
    read = load_grid(grid, overrides or [])
    folder = out_dir or Path("runs") / f"search-{read.name}"
    from vlmix.search.engine import run

    kind = "ray" if executor == "ray" else "processes"
    _show(run(read, folder, jobs=jobs, executor=kind, console=err()), folder)


def _show(summary: Summary, folder: Path) -> None:
    from vlmix.search.report import check_sentence, cost_cells, cost_sentence, spread

    table = Table(title=escape(summary.grid.name), title_justify="left", box=None, padding=(0, 2))
    for column in ("choice", "objective", "FLOPs", "tokens", "seconds", "alone"):
        table.add_column(column, justify="left" if column == "choice" else "right")
    for row in summary.rows:
        chosen = row.point == summary.found.best
        table.add_row(
            escape(row.point.label), spread(row.estimate).replace("[", "\\["), *cost_cells(row),
            style="bold green" if chosen else "red" if row.error else None,
        )  # fmt: skip
    console = out()
    console.print(table)
    said = [f"best    {summary.found.best.label}", *summary.found.notes, cost_sentence(summary.cost)]
    for line in [
        *said,
        *(check_sentence(check) for check in summary.checks),
        f"report  {folder / 'search.html'}",
    ]:
        console.print(line, markup=False, soft_wrap=True)
