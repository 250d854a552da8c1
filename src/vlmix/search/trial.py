"""One trial: a resolved recipe, trained and judged in its own folder, and what that cost.

A trial that was stopped goes on where its run was last saved; one that is done is read, not run.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from vlmix.core.errors import DataError, InputError, NonFiniteError, RunLockedError, SpikeError
from vlmix.core.files import read_json, write_json
from vlmix.core.interfaces import Benchmark
from vlmix.core.parts import BENCHMARKS, read_part
from vlmix.core.sample import Score
from vlmix.core.settings import read_settings
from vlmix.evals.report import write_report
from vlmix.evals.responder import ModelResponder
from vlmix.evals.run import EvalResult, evaluate
from vlmix.models.loading import load
from vlmix.models.plan import plan_model
from vlmix.search.ledger import Entry, Seconds
from vlmix.train.build import recipe_config
from vlmix.train.checkpoint import CHECKPOINTS
from vlmix.train.feature_cache import LOOKS
from vlmix.train.recipe import Recipe
from vlmix.train.records import read_metrics
from vlmix.train.run import run_recipe

RESULT, REPORT = "trial.json", "report"
_METRICS, _ALIGNED = "metrics.jsonl", "aligned.json"
# What is the trial's own fault; a full disk or a folder in use is not, and ends the search.
FAULTS: Final = (InputError, DataError, NonFiniteError, SpikeError)


def run_trial(key: str, recipe: Recipe, folder: Path, told: Mapping[str, Any], console: Console) -> Entry:
    """Train, judge and cost a trial in ``folder``; ``told`` is what else its entry says.

    A recipe that cannot be trained gives an entry with ``error`` set.

    Raises:
        VlmixError: if the machine is at fault, or the run was stopped.

    """
    if (folder / RESULT).is_file():
        return read_settings(Entry, read_json(folder / RESULT), str(folder / RESULT))
    begun, before = time.perf_counter(), _trained(folder)
    try:
        run_recipe(recipe, folder, resume=folder.exists(), console=console)
        results = judge(recipe, folder)
        cost = _cost(recipe)
    except FAULTS as error:
        if isinstance(error, RunLockedError):
            raise
        spent = Seconds(total=time.perf_counter() - begun + before, train=_trained(folder), judge=0.0)
        return Entry(key=key, error=str(error), seconds=spent, **told)
    judged = sum(result.model.seconds for result in results)
    total = time.perf_counter() - begun + before
    made, used = _pieces(folder)
    entry = Entry(
        key=key,
        figures=figures_of(results),
        questions=sum(len(result.samples) for result in results),
        cost={**cost, "seconds": total},
        seconds=Seconds(total=total, train=_trained(folder), judge=judged),
        made=made,
        used=used,
        **told,
    )
    write_json(folder / RESULT, entry.model_dump(mode="json"))
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return entry


def judge(recipe: Recipe, folder: Path) -> list[EvalResult]:
    """Ask the trained model what the recipe says, and leave a report.

    Raises:
        VlmixError: if an answer is missing.

    """
    responder = ModelResponder(*load(folder))
    results = [
        evaluate(responder, open_benchmark(judged.benchmark), limit=judged.limit, blind=False)
        for judged in recipe.evals
    ]
    write_report(folder / REPORT, recipe.name, results)
    return results


def open_benchmark(raw: dict[str, Any]) -> Benchmark:
    """The benchmark that ``{"kind": …}`` describes."""
    settings = read_part(BENCHMARKS, raw, "benchmark")
    return BENCHMARKS.get(settings.kind)(settings)


def benchmark_names(recipe: Recipe) -> list[str]:
    """What a formula calls each benchmark: its kind, the second of a kind with ``_2`` behind it."""
    kinds = [str(judged.benchmark["kind"]) for judged in recipe.evals]
    return [
        kind if kinds[:index].count(kind) == 0 else f"{kind}_{kinds[:index].count(kind) + 1}"
        for index, kind in enumerate(kinds)
    ]


def figures_of(results: Sequence[EvalResult]) -> dict[str, float]:
    """Figures by ``benchmark.figure`` and means by ``benchmark.tasks.task``."""
    found: dict[str, float] = {}
    kinds: list[str] = []
    for result in results:
        kinds.append(result.benchmark)
        count = kinds.count(result.benchmark)
        name = result.benchmark if count == 1 else f"{result.benchmark}_{count}"
        found |= named_figures(name, result.model.figures, result.model.scores)
    return found


def named_figures(name: str, figures: Mapping[str, float], scores: Sequence[Score]) -> dict[str, float]:
    """The figures of one benchmark as formulas call them."""
    tasks: dict[str, list[float]] = {}
    for score in (score for score in scores if score.counted):
        tasks.setdefault(score.task, []).append(score.value)
    means = {task: math.fsum(values) / len(values) for task, values in tasks.items() if task}
    return {
        **{f"{name}.tasks.{task}": mean for task, mean in means.items()},
        **{f"{name}.{figure}": value for figure, value in figures.items()},
    }


def _cost(recipe: Recipe) -> dict[str, float]:
    plan = plan_model(recipe_config(recipe))
    return {
        "flops": float(plan.prefill_flops),
        "tokens": float(plan.vision.tokens),
        "parameters": float(plan.parameters),
    }


def _trained(folder: Path) -> float:
    """Seconds of the optimizer steps so far."""
    return math.fsum(row["seconds"] for row in read_metrics(folder / _METRICS))


def _pieces(folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of what the run made that others can take, by name; what it took, and what part of it."""
    made, used, spent = dict[str, float](), dict[str, float](), dict[str, float]()
    for row in read_metrics(folder / _METRICS):
        if reused := row.get("reused"):
            used[f"aligned {Path(reused).name}"] = 1.0
        else:
            spent[row["stage"]] = spent.get(row["stage"], 0.0) + row["seconds"]
    notes = read_json(folder / _ALIGNED) if (folder / _ALIGNED).is_file() else {}
    made |= {f"aligned {notes[stage]['key']}": seconds for stage, seconds in spent.items() if stage in notes}
    looks = (folder / LOOKS).read_text(encoding="utf-8").splitlines() if (folder / LOOKS).is_file() else []
    for note in map(json.loads, looks):
        pictures, computed = max(note["pictures"], 1), note["computed"]
        for encoder, seconds in note["encoders"].items():
            name = f"features {note['stage']} {encoder}"
            if computed:
                made[name] = seconds * max(pictures / computed, 1.0)
            if (part := 1 - computed / pictures) > 0:
                used[name] = part
    return made, used
