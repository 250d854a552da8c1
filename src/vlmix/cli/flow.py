"""From a recipe to a judged model: what `train` and `demo` share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vlmix.cli.console import err
from vlmix.core.interfaces import Benchmark
from vlmix.core.parts import BENCHMARKS, read_part
from vlmix.core.sample import Decoding
from vlmix.evals.report import Curve, read_curves, write_report
from vlmix.evals.responder import ModelResponder
from vlmix.evals.run import EvalResult, evaluate
from vlmix.models.loading import load
from vlmix.train.recipe import Recipe
from vlmix.train.run import run_recipe


def train_and_judge(recipe: Recipe, folder: Path, *, resume: bool) -> list[EvalResult]:
    """Run the recipe's stages, then its benchmarks; leave model, curves and report in ``folder``."""
    run_recipe(recipe, folder, resume=resume, console=err())
    questions = [(open_benchmark(judged.benchmark), judged.limit) for judged in recipe.evals]
    if not questions:
        return []
    results = judge(folder, questions)
    write_report(
        folder / "report",
        recipe.name,
        results,
        curves=read_curves(folder / "metrics.jsonl"),
        recipe_text=(folder / "recipe.yaml").read_text(encoding="utf-8"),
        notes=recipe.fidelity,
    )
    return results


def open_benchmark(raw: dict[str, object]) -> Benchmark:
    """The benchmark that ``{"kind": …}`` describes."""
    settings = read_part(BENCHMARKS, raw, "benchmark")
    return BENCHMARKS.get(settings.kind)(settings)


def judge(
    model_path: Path, benchmarks: Sequence[tuple[Benchmark, int | None]], decoding: Decoding | None = None
) -> list[EvalResult]:
    """Ask the model at ``model_path`` every benchmark's questions, with progress on standard error."""
    model, processor = load(model_path)
    responder = ModelResponder(model, processor)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    results: list[EvalResult] = []
    with Progress(*columns, console=err()) as bars:
        for benchmark, limit in benchmarks:
            rows: dict[str, object] = {}

            def tell(
                what: str, done: int, total: int, rows: dict = rows, name: str = benchmark.settings.kind
            ) -> None:
                if what not in rows:
                    rows[what] = bars.add_task(f"{name}: {what}", total=total)
                bars.update(rows[what], completed=done)

            results.append(evaluate(responder, benchmark, decoding, limit=limit, progress=tell))
    return results


__all__ = ["Curve", "judge", "open_benchmark", "replace", "train_and_judge"]
