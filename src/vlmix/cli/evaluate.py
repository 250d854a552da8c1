"""``vlmix eval``: judge a model on benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.markup import escape
from rich.table import Table

from vlmix.cli.console import err, out
from vlmix.core.errors import InputError
from vlmix.core.parts import BENCHMARKS

if TYPE_CHECKING:
    from vlmix.evals.routing import RoutingReport
    from vlmix.evals.run import EvalResult

_RECIPE = "recipe.yaml"


def evaluate(  # noqa: PLR0913, PLR0917 - each is an option of the command
    model: Path = typer.Argument(help="A model folder or a run folder."),
    benchmark: str = typer.Option(
        "",
        "--benchmark",
        "-b",
        help="One name or several, separated by commas; those of the run's recipe if left out.",
        show_default=False,
    ),
    data: Path = typer.Option(None, "--data", help="Folder of the benchmark's data, where it needs one."),
    limit: int = typer.Option(None, "--limit", min=1, help="Ask only the first so many questions."),
    out_dir: Path = typer.Option(None, "--out", help="Report folder; MODEL/report-BENCHMARK if left out."),
    batch_size: int = typer.Option(64, "--batch-size", min=1, help="Questions answered at once."),
    settings: list[str] = typer.Option([], "--set", help="A benchmark setting as key=value, such as seed=7."),
    routing: bool = typer.Option(
        False,
        "--routing",
        help="Watch the experts while they answer: adds their load, paths, pictures of who sees which "
        "patch, and a verdict to the report, and writes routing.json.",
    ),
) -> None:
    """Judge MODEL on benchmarks and write report.html, results.json and answers.jsonl.

    Every figure comes with its 95 % interval, the majority answer, and the blind control: the same questions
    with the pictures exchanged.

    A run folder is judged as its recipe says: a benchmark under `evals` keeps the settings and the limit it
    has there, except what --set, --data and --limit change. Other benchmarks have their own defaults.

    --routing counts every token of the questions and answers once, by layer, expert and whether it is of a
    picture or text; the controls are not counted. An expert's number means nothing outside its own layer.
    """
    wanted = _wanted(model, [name for name in benchmark.split(",") if name])
    names = list(dict.fromkeys(str(raw["kind"]) for raw, _ in wanted))
    wanted = [(_changed(raw, data, settings), limit or own) for raw, own in wanted]

    from vlmix.cli.flow import judge, judge_watched, open_benchmark
    from vlmix.core.sample import Decoding
    from vlmix.evals.report import check_report_folder, write_report
    from vlmix.models.loading import model_folder

    folder, target = model_folder(model), out_dir or model / f"report-{'-'.join(names)}"
    check_report_folder(target)
    benchmarks = [(open_benchmark(raw), most) for raw, most in wanted]
    decoding, seen = Decoding(batch_size=batch_size), None
    if routing:
        results, seen = judge_watched(folder, benchmarks, decoding)
    else:
        results = judge(folder, benchmarks, decoding)
    write_report(target, f"{model} on {', '.join(names)}", results, routing=seen)
    show_results(results)
    if seen is not None:
        show_routing(seen)
    out().print(f"report  {target / 'report.html'}")


def _wanted(model: Path, names: list[str]) -> list[tuple[dict[str, object], int | None]]:
    """Raw settings and limit of every benchmark that is asked for, as the recipe of the run has them.

    Raises:
        InputError: if none is named and MODEL is no run whose recipe names one.
        UnknownNameError: if there is no such benchmark.

    """
    for name in names:
        if name not in BENCHMARKS.names():
            BENCHMARKS.get(name)
    judged = _of_recipe(model / _RECIPE) if (model / _RECIPE).is_file() else []
    if not (names or judged):
        raise InputError(
            f"{model}: no benchmark is named, and there is no run whose recipe names one under `evals`. Give "
            f"--benchmark, one of: {', '.join(BENCHMARKS.names())}"
        )
    wanted: list[tuple[dict[str, object], int | None]] = []
    for name in names or dict.fromkeys(str(raw["kind"]) for raw, _ in judged):
        own = [(raw, limit) for raw, limit in judged if raw["kind"] == name]
        for raw, limit in own:
            told = [f"{key}={value}" for key, value in raw.items() if key != "kind"]
            most = [] if limit is None else [f"--limit {limit}"]
            words = " ".join([name, *told, *most])
            err().print(f"as in {model / _RECIPE}: {words}", markup=False, soft_wrap=True)
        wanted += own or [({"kind": name}, None)]
    return wanted


def _of_recipe(path: Path) -> list[tuple[dict[str, object], int | None]]:
    """The benchmarks of a recipe with their limits; nothing else of it is looked at."""
    from vlmix.core.settings import read_settings
    from vlmix.train.recipe import EvalSettings
    from vlmix.train.yaml_file import read_yaml

    raws = read_yaml(path).get("evals") or []
    judged = [read_settings(EvalSettings, raw, f"{path}: evals.{index}") for index, raw in enumerate(raws)]
    return [(dict(each.benchmark), each.limit) for each in judged]


def _changed(raw: dict[str, object], data: Path | None, settings: list[str]) -> dict[str, object]:
    from vlmix.train.recipe_file import with_overrides

    if data is not None:
        if not data.exists():
            raise InputError(f"--data {data}: no such folder")
        raw = {**raw, "path": str(data)}
    return with_overrides(raw, settings)


def show_routing(seen: RoutingReport) -> None:
    """Print the verdict on the experts, each layer that is not balanced, and what the words mean."""
    colour = "green" if seen.verdict.state == "balanced" else "yellow"
    out().print(f"experts  [{colour}]{escape(seen.verdict.sentence)}[/]", soft_wrap=True)
    for layer in seen.verdict.layers:
        if layer.state != "balanced":
            unused = f"; unused: {', '.join(map(str, layer.unused))}" if layer.unused else ""
            used = f"{layer.effective:.1f} of {layer.experts} experts in effect"
            out().print(f"  {layer.layer}: {layer.state}, {used}{unused}", markup=False, soft_wrap=True)
    out().print(f"  {seen.rules}", style="dim", markup=False, soft_wrap=True)


def show_results(results: list) -> None:
    """Print each benchmark's figures beside its controls."""
    for result in results:
        table = Table(
            title=f"{result.benchmark}: {len(result.samples)} questions", title_justify="left", box=None
        )
        for column in ("figure", "model", "95 % interval", "blind", "majority by task"):
            table.add_column(column, justify="left" if column == "figure" else "right")
        for name in result.model.figures:
            table.add_row(*_cells(result, name))
        out().print(table)
        if result.model.failed:
            out().print(
                f"[yellow]{result.model.failed} questions could not be asked; they count as wrong.[/]"
            )


def _cells(result: EvalResult, name: str) -> tuple[str, ...]:
    """One figure beside its controls: percent, or its own unit where it is no share of 1."""

    def told(value: float | None) -> str:
        if value is None:
            return ""
        return f"{value:.3f} {result.units[name]}".strip() if name in result.units else f"{value:.1%}"

    interval, majority = result.model.intervals[name], result.majority_by_task.figures.get(name)
    blind = None if result.blind is None else result.blind.figures.get(name)
    ends = f"{told(interval.low)} to {told(interval.high)}"
    return name, told(interval.value), ends, told(blind), told(majority)
