"""``vlmix eval``: judge a model on benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from rich.markup import escape
from rich.table import Table

from vlmix.cli.console import err, out
from vlmix.cli.eval_options import (
    BatchOption,
    BenchmarkOption,
    ChooseOption,
    DataOption,
    FromOption,
    KeyOption,
    LimitOption,
    ModelArgument,
    ModelNameOption,
    OutOption,
    RoutingOption,
    SettingsOption,
)
from vlmix.cli.judge_option import (
    KEY_VARIABLE,
    JudgeKeyOption,
    JudgeModelOption,
    JudgeOption,
    JudgeRulesOption,
    judge_of,
    with_judge,
)
from vlmix.cli.subject import Subject
from vlmix.cli.wanted import changed, wanted
from vlmix.core.errors import InputError, UnknownNameError
from vlmix.core.sample import Choice, Decoding

if TYPE_CHECKING:
    from vlmix.evals.routing import RoutingReport
    from vlmix.evals.run import EvalResult


def evaluate(  # noqa: PLR0913, PLR0917 - each is an option of the command
    model: ModelArgument = "",
    benchmark: BenchmarkOption = "",
    data: DataOption = None,
    limit: LimitOption = None,
    out_dir: OutOption = None,
    batch_size: BatchOption = None,
    settings: SettingsOption = [],  # noqa: B006 - typer reads it
    choose: ChooseOption = "text",
    routing: RoutingOption = False,
    answers: FromOption = None,
    model_name: ModelNameOption = "",
    key_variable: KeyOption = KEY_VARIABLE,
    judge: JudgeOption = [],  # noqa: B006 - typer reads it
    judge_model: JudgeModelOption = "",
    judge_key_variable: JudgeKeyOption = KEY_VARIABLE,
    judge_rules: JudgeRulesOption = None,
) -> None:
    """Judge MODEL on benchmarks and write report.html, results.json and answers.jsonl.

    Every figure comes with its 95 % interval, the majority answer, and the blind control: the same questions
    with the pictures exchanged.

    A run folder is judged as its recipe says: a benchmark under `evals` keeps the settings and the limit it
    has there, except what --set, --data and --limit change. Other benchmarks have their own defaults.

    Answers are kept as they are given: a run that was stopped goes on where it was when the same command is
    given again. `torchrun --nproc-per-node 2 -m vlmix eval ...` shares the questions among processes. The
    files are the same, byte for byte.

    --routing counts every token of the questions and answers once, by layer, expert and whether it is of a
    picture or text; the controls are not counted. An expert's number means nothing outside its own layer.
    """
    subject, choice = _subject(model, answers, model_name, key_variable), _choice(choose)
    raws = wanted(subject.folder, [name for name in benchmark.split(",") if name])
    marker = judge_of(judge, judge_model, judge_key_variable)
    marked = with_judge([changed(raw, data, settings) for raw, _ in raws], marker, judge_rules)
    raws = [(raw, limit or own) for raw, (_, own) in zip(marked, raws, strict=True)]
    if out_dir is None and subject.folder is None:
        raise InputError("there is no model folder to put the report into: say where with --out DIR")
    names = "-".join(dict.fromkeys(str(raw["kind"]) for raw, _ in raws))
    target = out_dir or Path(model) / f"report-{names}"

    decoding = Decoding(batch_size=batch_size or (8 if subject.url else 64), choose=choice)
    _judge(subject, raws, decoding, target, routing=routing)


def _judge(
    subject: Subject,
    raws: Sequence[tuple[dict[str, object], int | None]],
    decoding: Decoding,
    target: Path,
    *,
    routing: bool,
) -> None:
    """Judge, write the report and show what came of it; on other processes than the first, answer only."""
    from vlmix.cli.flow import open_benchmark
    from vlmix.cli.judging import judge_subject
    from vlmix.evals.cost import run_costs
    from vlmix.evals.report import write_report
    from vlmix.models.loading import model_folder

    if subject.folder is not None:
        model_folder(subject.folder)
    benchmarks = [(open_benchmark(raw), most) for raw, most in raws]
    with judge_subject(subject, benchmarks, decoding, target, routing=routing) as judged:
        if judged is None:
            return
        title = f"{subject.title} on {', '.join(dict.fromkeys(str(raw['kind']) for raw, _ in raws))}"
        costs = run_costs(model_folder(subject.folder), judged.results) if subject.folder else ()
        write_report(target, title, judged.results, notes=judged.notes, routing=judged.routing, costs=costs)
    err().print(judged.summary, markup=False, soft_wrap=True)
    for note in judged.notes:
        err().print(note, style="yellow", markup=False, soft_wrap=True)
    show_results(judged.results)
    if judged.routing is not None:
        show_routing(judged.routing)
    out().print(f"report  {target / 'report.html'}")


def _subject(model: str, answers: Path | None, model_name: str, key_variable: str) -> Subject:
    """Who is judged.

    Raises:
        InputError: if nobody is named, or two are.

    """
    if (answers is None) == (not model):
        raise InputError("name a MODEL to judge, or a file of answers with --from, and not both")
    if answers is not None:
        return Subject(title=answers.name, answers=answers)
    if model.startswith(("http://", "https://")):
        if not model_name:
            raise InputError(f"{model}: say with --model-name which of the server's models is to answer")
        return Subject(title=model_name, url=model, model_name=model_name, key_variable=key_variable)
    if model_name:
        raise InputError("--model-name is for servers; MODEL is a folder")
    return Subject(title=model, folder=Path(model))


def _choice(name: str) -> Choice:
    """The way of choosing that is so called.

    Raises:
        UnknownNameError: if there is none.

    """
    known = {each: each for each in get_args(Choice)}
    if name not in known:
        raise UnknownNameError("way to choose", name, known)
    return known[name]


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


def show_results(results: Sequence[EvalResult]) -> None:
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
        if result.note:
            out().print(result.note, style="yellow", markup=False, soft_wrap=True)
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
