"""A comparison folder: a page to read, Markdown to paste, JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vlmix.core.errors import InputError
from vlmix.core.files import publish, write_json, write_text
from vlmix.evals.comparison import LEVEL, Comparison
from vlmix.evals.comparison_view import BenchmarkView, Table
from vlmix.evals.rendering import filled

SCHEMA: Final = "vlmix.comparison/1"
_JSON: Final = "comparison.json"


def check_comparison_folder(folder: Path) -> None:
    """Refuse to put a comparison where it would replace anything but an older one.

    Raises:
        InputError: if there is a file, or a folder that holds something else.

    """
    if not folder.exists() or (folder / _JSON).is_file():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise InputError(
            f"{folder} exists and is not a comparison: one replaces its whole folder. Choose a new one"
        )


def write_comparison(folder: Path, comparison: Comparison, views: Sequence[BenchmarkView]) -> Path:
    """Write the files as a whole folder, replacing an older comparison, and return the page's path.

    Raises:
        InputError: if ``folder`` holds something that is no comparison.
        DiskFullError: if there is no room; an older comparison is then unchanged.

    """
    check_comparison_folder(folder)
    names = [run.name for run in comparison.runs]
    page = filled("compare.html.jinja", names=names, comparison=comparison, views=views, level=LEVEL)
    with publish(folder) as temporary:
        write_json(temporary / _JSON, {"schema": SCHEMA, **comparison.to_json()})
        write_text(temporary / "comparison.md", as_markdown(comparison, views))
        write_text(temporary / "comparison.html", page)
    return folder / "comparison.html"


def as_markdown(comparison: Comparison, views: Sequence[BenchmarkView]) -> str:
    """Verdicts and tables in Markdown."""
    lines = ["# " + " against ".join(_cell(run.name) for run in comparison.runs), ""]
    for view in views:
        lines += [f"## {_cell(view.name)}", ""]
        for each in view.contests:
            lines += [f"- {_cell(each.contest.verdict)}", *(f"  - {_cell(r)}" for r in each.contest.remarks)]
        lines.append("")
        for table in (view.runs, view.verdicts, *(each.tasks for each in view.contests), view.costs):
            lines += [*_table(table), ""]
    lines += [
        _cell(f"Not compared: {each.benchmark} of {each.first} and {each.second}: {each.reason}")
        for each in comparison.refused
    ]
    return "\n".join(lines).rstrip().encode("utf-8", "replace").decode("utf-8") + "\n"


def _table(table: Table) -> list[str]:
    head, *rows = ([_cell(cell) for cell in row] for row in table.rows)
    marks = ["---"] + ["---:"] * (len(head) - 1)
    lines = [f"| {' | '.join(row)} |" for row in (head, marks, *rows)]
    return [f"**{_cell(table.title)}**", "", *lines, *(f"\n{_cell(note)}" for note in table.notes)]


def _cell(text: str) -> str:
    """Text that neither ends a cell or a line nor becomes markup."""
    flat = " ".join(text.split())
    for mark in "\\`*_<>|[]":
        flat = flat.replace(mark, f"\\{mark}")
    return flat
