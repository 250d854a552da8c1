"""``vlmix compare``: judged runs side by side, question by question."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.table import Table
from rich.text import Text

from vlmix.cli.console import out
from vlmix.core.errors import InputError

if TYPE_CHECKING:
    from vlmix.evals.comparison import Comparison
    from vlmix.evals.comparison_view import Against
    from vlmix.evals.comparison_view import Table as Rows


def compare(
    runs: list[Path] = typer.Argument(help="Report folders, or run folders that hold reports; two or more."),
    baseline: Path = typer.Option(
        None, "--baseline", help="The run that the others are compared with; else each with each."
    ),
    out_dir: Path = typer.Option(Path("comparison"), "--out", help="Folder of the page and the tables."),
    examples: int = typer.Option(6, "--examples", min=0, help="Questions shown that a run won, and lost."),
    against: str = typer.Option(
        "", "--against", help="What score is drawn against: flops, tokens or seconds; else what is known."
    ),
) -> None:
    """Compare RUNS on the same questions: differences with paired intervals, exact tests, and a verdict.

    Writes comparison.html, comparison.md and comparison.json. Runs that were scored by different protocols or
    asked different questions are not compared, and the reason is given.

    `vlmix compare runs/a runs/b` says who is ahead and by how much, or that it cannot be told;
    `vlmix compare runs/a runs/b runs/c --baseline runs/a` compares b and c with a, corrected for two.
    """
    from vlmix.evals.comparison import compare_runs
    from vlmix.evals.comparison_report import check_comparison_folder, write_comparison
    from vlmix.evals.comparison_view import AXES, benchmark_views
    from vlmix.evals.past_runs import read_runs

    axes: dict[str, Against] = {name: name for name in AXES}
    axis = axes.get(against)
    if against and axis is None:
        raise InputError(f"--against {against}: choose one of {', '.join(AXES)}")
    check_comparison_folder(out_dir)
    found = read_runs(runs)
    base = "" if baseline is None else _named(baseline, runs)
    comparison = compare_runs(found, base)
    views = benchmark_views(comparison, examples=examples, against=axis)
    page = write_comparison(out_dir, comparison, views)
    for view in views:
        out().print(_plain(view.name), style="bold")
        _show(view.runs)
        _show(view.costs)
    _tell(comparison)
    out().print(f"page  {page}", markup=False, soft_wrap=True)


def _named(baseline: Path, runs: list[Path]) -> str:
    """The baseline as the list of runs spells it."""
    return next((str(run) for run in runs if run.resolve() == baseline.resolve()), str(baseline))


def _show(rows: Rows) -> None:
    table = Table(box=None, title=_plain(rows.title), title_justify="left")
    for index, head in enumerate(rows.rows[0]):
        table.add_column(_plain(head), justify="right" if index else "left")
    for row in rows.rows[1:]:
        table.add_row(*map(_plain, row))
    out().print(table)
    for note in rows.notes:
        out().print(_plain(note), style="dim", soft_wrap=True)
    out().print()


def _tell(comparison: Comparison) -> None:
    """The verdicts with what has to be known of them, and what was not compared."""
    for each in comparison.contests:
        colour = "yellow" if each.state == "undecided" else "green"
        out().print(_plain(f"{each.benchmark}: {each.verdict}"), style=colour, soft_wrap=True)
        won = f"{each.second} won {each.questions.wins} questions and lost {each.questions.losses}"
        out().print(_plain(f"  {won}; {each.test}"), style="dim", soft_wrap=True)
        for remark in each.remarks:
            out().print(_plain(f"  {remark}"), style="dim", soft_wrap=True)
    for refusal in comparison.refused:
        pair = f"{refusal.first} and {refusal.second}"
        told = f"{refusal.benchmark}: {pair} are not compared: {refusal.reason}"
        out().print(_plain(told), style="yellow", soft_wrap=True)


def _plain(text: str) -> Text:
    """Text as it is: no markup, nothing that moves the cursor."""
    return Text("".join(mark if mark.isprintable() else "\N{OPEN BOX}" for mark in text))
