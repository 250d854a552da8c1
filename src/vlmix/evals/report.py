"""A report folder: ``results.json`` for programs, ``answers.jsonl`` for doubters, ``report.html`` for people.

``routing.json`` is there too where experts were watched, ``forgetting.json`` and ``forgetting.png`` where
tasks were learnt one after the other.
``replicates.json`` is there where a figure is no mean of scores: ``vlmix compare`` pairs such figures by it.
Neither time nor batch size is in the results, so judging again gives the same bytes; both are in
``timing.json``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlmix.core.errors import InputError
from vlmix.core.files import LOCK, publish, write_json, write_text
from vlmix.evals.controls import majority_answer, majority_by_task, question_of, targets_of
from vlmix.evals.cost import RunCost, timing
from vlmix.evals.curves import Curve, read_curves
from vlmix.evals.forgetting import ForgettingMatrix, write_forgetting
from vlmix.evals.rendering import render_page
from vlmix.evals.routing import RoutingReport
from vlmix.evals.run import EvalResult, Outcome
from vlmix.evals.statistics import Interval

__all__ = [
    "ANSWERS",
    "REPLICATES",
    "RESULTS",
    "ROUTING",
    "SCHEMA",
    "TIMING",
    "Curve",
    "as_json",
    "check_report_folder",
    "read_curves",
    "write_report",
]

SCHEMA = "vlmix.results/1"
RESULTS = "results.json"
ANSWERS = "answers.jsonl"
TIMING = "timing.json"
REPLICATES = "replicates.json"
ROUTING = "routing.json"
UNFINISHED = "unfinished"
_DIGITS = 6


def check_report_folder(folder: Path) -> None:
    """Refuse to put a report where it would replace anything but an older report, or a run towards one.

    Raises:
        InputError: if there is a file, or a folder that holds something else.

    """
    if not folder.exists() or (folder / RESULTS).is_file():
        return
    if not folder.is_dir() or {path.name for path in folder.iterdir()} - {LOCK, UNFINISHED}:
        raise InputError(
            f"{folder} exists and is not a report: a report replaces its whole folder. Choose a new one"
        )


def write_report(  # noqa: PLR0913  (each is a part of the page)
    folder: Path,
    title: str,
    results: Sequence[EvalResult],
    *,
    curves: Sequence[Curve] = (),
    recipe_text: str = "",
    notes: Sequence[str] = (),
    gallery: int = 12,
    routing: RoutingReport | None = None,
    forgetting: ForgettingMatrix | None = None,
    costs: Sequence[RunCost] = (),
) -> Path:
    """Write the files as a whole folder, replacing an older report, and return the page's path.

    ``notes`` are sentences shown above the details, such as what was quarantined; ``gallery`` is the
    number of answers shown with their pictures for each benchmark; ``routing`` adds what experts did, and
    ``forgetting`` what each task cost those before it. ``costs`` has what a question costs, for each result.

    Raises:
        InputError: if ``folder`` holds something that is not a report.
        DiskFullError: if there is no room; an older report is then unchanged.

    """
    check_report_folder(folder)
    notes = [*notes, *(result.note for result in results if result.note)]
    page = render_page(
        title,
        results,
        curves=curves,
        recipe_text=recipe_text,
        notes=notes,
        gallery=gallery,
        routing=routing,
        forgetting=forgetting,
        costs=costs,
    )
    told = list(map(as_json, results))
    if costs:
        told = [{**entry, "cost": asdict(cost)} for entry, cost in zip(told, costs, strict=True)]
    found = {
        "schema": SCHEMA,
        "title": title,
        "notes": notes,
        "results": told,
    }
    replicates = [{"blocks": each.model.blocks, "figures": each.model.replicates} for each in results]
    with publish(folder) as temporary:
        write_json(temporary / RESULTS, found)
        write_text(temporary / ANSWERS, "".join(map(_answer_lines, results)))
        write_json(temporary / TIMING, {result.benchmark: timing(result) for result in results})
        if any(each["figures"] for each in replicates):
            write_json(temporary / REPLICATES, {"schema": SCHEMA, "results": replicates})
        if routing is not None:
            write_json(temporary / ROUTING, routing.to_json())
        if forgetting is not None:
            write_forgetting(temporary, forgetting)
        write_text(temporary / "report.html", page)
    return folder / "report.html"


def as_json(result: EvalResult) -> Mapping[str, Any]:
    """One benchmark's entry of ``results.json``: figures and intervals to six decimals, and how they came."""
    decoding = asdict(result.decoding)
    decoding.pop("batch_size")
    name = result.headline
    return {
        "benchmark": result.benchmark,
        "paper": result.paper,
        **({"protocol": {"name": result.protocol, "source": result.source}} if result.protocol else {}),
        "settings": result.settings,
        "headline": name,
        "n": len(result.samples),
        "failed": result.model.failed,
        "states": dict(sorted(Counter(score.state for score in result.model.scores).items())),
        "unasked": {sample.id: sample.defect for sample in result.samples if sample.defect},
        "figures": {key: round(value, _DIGITS) for key, value in result.model.figures.items()},
        **({"units": dict(result.units)} if result.units else {}),
        "intervals": {key: _interval(value) for key, value in result.model.intervals.items()},
        "tasks": {task: _interval(value) for task, value in result.model.tasks.items()},
        "blind": _control(result.blind, name) if result.blind else None,
        "majority": {
            **_control(result.majority, name),
            "answer": majority_answer(result.samples),
        },
        "majority_by_task": {
            **_control(result.majority_by_task, name),
            "answers": majority_by_task(result.samples),
        },
        "decoding": decoding,
        "seeds": {"blind": result.seed, "resampling": result.seed},
        "versions": result.versions,
    }


def _control(outcome: Outcome, headline: str) -> dict[str, Any]:
    return {
        "n": len(outcome.scores),
        "failed": outcome.failed,
        "figures": {key: round(value, _DIGITS) for key, value in outcome.figures.items()},
        "interval": _interval(outcome.intervals[headline]),
        "tasks": {task: _interval(value) for task, value in outcome.tasks.items()},
    }


def _interval(interval: Interval) -> Mapping[str, Any]:
    return {key: round(v, _DIGITS) if isinstance(v, float) else v for key, v in asdict(interval).items()}


def _answer_lines(result: EvalResult) -> str:
    rows = zip(result.samples, result.model.answers, result.model.scores, strict=True)
    lines = (
        {
            "benchmark": result.benchmark,
            "sample_id": sample.id,
            "task": score.task,
            "group": score.group,
            "question": question_of(sample).turns[-1].text,
            "targets": targets_of(sample),
            "answer": answer.text,
            "parsed": score.parsed,
            "value": score.value,
            "state": score.state,
            "counted": score.counted,
            "tokens": answer.tokens,
            "error": answer.error,
        }
        for sample, answer, score in rows
    )
    return "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines)
