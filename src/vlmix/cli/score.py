"""``vlmix score``: official scores for answers made anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Final

import typer
from rich.table import Table
from rich.text import Text

from vlmix.cli.console import out
from vlmix.cli.judge_option import (
    KEY_VARIABLE,
    JudgeKeyOption,
    JudgeModelOption,
    JudgeOption,
    JudgeRulesOption,
    judge_of,
)

if TYPE_CHECKING:
    from vlmix.evals.scored import Scored

_ROWS_SHOWN: Final = 20
_WIDTH: Final = 60


def score(  # noqa: PLR0913, PLR0917 - each is an option of the command
    benchmark: str = typer.Argument(help="Whose rule: a name that `vlmix list scorers` shows."),
    file: Path = typer.Argument(help="JSONL, a JSON list, or a JSON object with `samples`."),
    protocol: str = typer.Option(
        "", "--protocol", "-p", help="Another rule for the same benchmark; the official one if left out."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object with every row's score."),
    judge: JudgeOption = [],  # noqa: B006 - typer reads it
    judge_model: JudgeModelOption = "",
    judge_key_variable: JudgeKeyOption = KEY_VARIABLE,
    judge_rules: JudgeRulesOption = None,
) -> None:
    """Score answers made anywhere as a benchmark's official script does: no model, no data set.

    Each row of FILE is an object: `gold` is what is right (a text, or all that annotators wrote), `answer`
    what the model said (null where it said nothing), `id` names it, and some benchmarks need more fields of
    the question. Other fields are ignored. With this line in answers.jsonl

        {"id": 1, "gold": "100", "answer": "95.5", "type": "human_test"}

    `vlmix score chartqa answers.jsonl` finds it right, being within five percent, and
    `vlmix score chartqa answers.jsonl --protocol qwen_vl` as well, though 95 it would find wrong.

    MM-Vet and LLaVA-Bench have their answers marked by a judging model: --judge names it. Without one they
    are scored by a rule that needs none, and the output says so. An answer that the judge gives no mark
    counts 0, is `failed`, and its row says why.

    The aggregates are the official script's own. Beside them stands a mean over **all** rows: one without a
    value counts 0, be it unscored, missing or malformed (not JSON, or without a field). Malformed lines are
    listed with their reason and never leave that mean's denominator.
    """
    from vlmix.evals.scored import score_file

    marker = judge_of(judge, judge_model, judge_key_variable)
    found = score_file(benchmark, file, protocol, judge=marker.judge() if marker else None, rules=judge_rules)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
    else:
        _show(found)


def _show(found: Scored) -> None:
    out().print(f"protocol  {found.protocol}", markup=False, soft_wrap=True)
    out().print(f"source    {found.source}", style="dim", markup=False, soft_wrap=True)
    if found.note:
        out().print(f"note      {found.note}", style="yellow", markup=False, soft_wrap=True)
    counts = ", ".join(
        f"{number} {name}" for name, number in found.counts().items() if number or name == "rows"
    )
    out().print(f"counts    {counts}\n", markup=False, soft_wrap=True)
    _show_rows(found)
    _show_summary(found)
    for bad in found.malformed[:_ROWS_SHOWN]:
        out().print(f"line {bad.line}: {bad.reason}", style="yellow", markup=False, soft_wrap=True)
    _tell_rest(len(found.malformed), "malformed lines")


def _show_rows(found: Scored) -> None:
    table = Table(box=None, title="rows", title_justify="left")
    for name in ("id", "score", "parsed", "state"):
        table.add_column(name, justify="right" if name == "score" else "left")
    for line, each in list(zip(found.lines, found.judged, strict=True))[:_ROWS_SHOWN]:
        value = "none" if each.value is None else f"{each.value:g}"
        parsed = each.parsed if len(each.parsed) <= _WIDTH else each.parsed[:_WIDTH] + "…"
        state = "" if each.state == "read" else each.state
        table.add_row(*map(_plain, (str(line.id), value, parsed, state)))
    out().print(table)
    _tell_rest(len(found.lines), "rows")
    out().print()


def _show_summary(found: Scored) -> None:
    from vlmix.core.scoring import flat, unit_of

    table = Table(box=None, title="aggregates", title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("unit")
    for name, value in flat(found.summary):
        table.add_row(_plain(name), f"{value:.6g}", unit_of(name, found.units))
    table.add_row("mean of all rows", f"{found.mean:.6g}", f"of {found.full:g}")
    out().print(table)


def _tell_rest(number: int, what: str) -> None:
    if number > _ROWS_SHOWN:
        out().print(f"… and {number - _ROWS_SHOWN} more {what}: --json has all", style="dim", markup=False)


def _plain(text: str) -> Text:
    """Text for one cell: no markup, nothing that moves the cursor."""
    return Text("".join(mark if mark.isprintable() else "\N{OPEN BOX}" for mark in text))
