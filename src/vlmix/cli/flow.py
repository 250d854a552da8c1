"""From a recipe to a judged model: what `train`, `eval` and `demo` share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmix.cli.asking import AskingProgress
from vlmix.cli.console import err, process_number
from vlmix.core.interfaces import Benchmark
from vlmix.core.parts import BENCHMARKS, read_part
from vlmix.core.sample import Decoding
from vlmix.evals.cost import run_costs
from vlmix.evals.forgetting import ForgettingMatrix
from vlmix.evals.report import read_curves, write_report
from vlmix.evals.responder import ModelResponder
from vlmix.evals.routing import RoutingReport, routing_report
from vlmix.evals.run import EvalResult, evaluate
from vlmix.evals.window import RoutingWindow
from vlmix.models.loading import load, model_folder
from vlmix.train.recipe import LANGUAGE, Recipe
from vlmix.train.records import read_metrics
from vlmix.train.run import run_recipe
from vlmix.train.stages import MODELS

Asked = tuple[Benchmark, int | None]


def train_and_judge(recipe: Recipe, folder: Path, *, resume: bool) -> list[EvalResult]:
    """Run the recipe's stages, then its benchmarks; leave model, curves and report in ``folder``."""
    run_recipe(recipe, folder, resume=resume, console=err())
    if process_number():
        return []
    asked = [(open_benchmark(judged.benchmark), judged.limit) for judged in recipe.evals]
    if not asked:
        return []
    results = judge(folder, asked)
    write_report(
        folder / "report",
        recipe.name,
        results,
        forgetting=forgetting_matrix(recipe, folder),
        curves=read_curves(folder / "metrics.jsonl"),
        recipe_text=(folder / "recipe.yaml").read_text(encoding="utf-8"),
        notes=[*recipe.fidelity, _rows_note(folder)],
        costs=run_costs(model_folder(folder), results),
    )
    return results


def forgetting_matrix(recipe: Recipe, folder: Path) -> ForgettingMatrix | None:
    """Judge the models that stages published on what each task is measured by; ``None`` where none is.

    A column is one kind of question of one benchmark.
    """
    measured = [judged for judged in recipe.evals if judged.task]
    first = next((place for place, stage in enumerate(recipe.stages) if stage.task), 0)
    before = [stage for stage in recipe.stages[:first] if stage.publish][-1:]
    if not measured or not before:
        return None
    asked = [(open_benchmark(judged.benchmark), judged.limit) for judged in measured]
    rows: list[dict[str, float]] = []
    columns: dict[str, list[str]] = {LANGUAGE: []}
    columns |= {stage.task: [] for stage in recipe.stages if stage.task}
    for stage in [*before, *(stage for stage in recipe.stages if stage.task)]:
        row: dict[str, float] = {}
        responder = ModelResponder(*load(folder / MODELS / stage.name))
        for of, (benchmark, limit) in zip(measured, asked, strict=True):
            result = evaluate(responder, benchmark, limit=limit, blind=False)
            points = {f"{of.task}: {kind}": 100 * found.value for kind, found in result.model.tasks.items()}
            columns[of.task] += [name for name in points if name not in columns[of.task]]
            row |= points
        rows.append(row)
    return ForgettingMatrix({task: tuple(names) for task, names in columns.items()}, tuple(rows))


def open_benchmark(raw: dict[str, Any]) -> Benchmark:
    """The benchmark that ``{"kind": …}`` describes."""
    settings = read_part(BENCHMARKS, raw, "benchmark")
    return BENCHMARKS.get(settings.kind)(settings)


def judge(model_path: Path, asked: Sequence[Asked], decoding: Decoding | None = None) -> list[EvalResult]:
    """Ask the model at ``model_path`` every benchmark's questions, with progress on standard error."""
    with AskingProgress(err()) as progress:
        return _asked_all(ModelResponder(*load(model_path)), asked, decoding, progress)


def judge_watched(
    model_path: Path, asked: Sequence[Asked], decoding: Decoding, progress: AskingProgress
) -> tuple[list[EvalResult], RoutingReport]:
    """The same, and what its experts did while it answered.

    Raises:
        InputError: if it has none.

    """
    model, processor = load(model_path)
    window, responder = RoutingWindow(model, processor), ModelResponder(model, processor)
    results = _asked_all(responder, asked, decoding, progress, window)
    return results, routing_report(window, [sample for result in results for sample in result.samples])


def _asked_all(
    responder: ModelResponder,
    asked: Sequence[Asked],
    decoding: Decoding | None,
    progress: AskingProgress,
    window: RoutingWindow | None = None,
) -> list[EvalResult]:
    return [
        evaluate(
            window.watch(responder) if window else responder,
            benchmark,
            decoding,
            limit=limit,
            progress=progress.of(benchmark.settings.kind),
        )
        for benchmark, limit in asked
    ]


def _rows_note(folder: Path) -> str:
    """How many rows training read, used and quarantined."""
    steps = read_metrics(folder / "metrics.jsonl")
    used, bad = sum(row["samples"] for row in steps), sum(row["quarantined"] for row in steps)
    return f"Training read {used + bad} rows: {used} used, {bad} quarantined (quarantine.jsonl says why)."
