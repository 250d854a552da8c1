"""A comparison as tables, pictures and example questions: what the page, the Markdown and the screen show."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from vlmix.core.errors import VlmixError
from vlmix.core.parts import BENCHMARKS, read_part
from vlmix.core.sample import Sample
from vlmix.evals.comparison import Comparison, Contest, told_chance, told_gap
from vlmix.evals.controls import question_of
from vlmix.evals.gallery import Picture, picture_of, shortened
from vlmix.evals.jackknife import UNDETERMINED, whole_of
from vlmix.evals.pareto import Priced, pareto_picture
from vlmix.evals.past_runs import PastResult
from vlmix.evals.rendering import NOT_DETERMINED

Against = Literal["flops", "tokens", "seconds"]
AXES: Final[Mapping[Against, str]] = {
    "flops": "GFLOP for a question",
    "tokens": "visual tokens of a question",
    "seconds": "seconds for a question",
}
_PICTURES = 4


@dataclass(frozen=True, slots=True)
class Table:
    """A table of text, heading first; ``notes`` stand below it."""

    title: str
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Example:
    """A question that one of two runs answered better, with its pictures where they can be had."""

    question: str
    expected: str
    first: str
    second: str
    task: str
    pictures: Sequence[Picture]


@dataclass(frozen=True, slots=True)
class ContestView:
    """Two runs on one benchmark, as the page shows them."""

    contest: Contest
    tasks: Table
    won: Sequence[Example]
    lost: Sequence[Example]


@dataclass(frozen=True, slots=True)
class BenchmarkView:
    """One benchmark: every run's figures and costs, the contests, and score against cost as a picture."""

    name: str
    runs: Table
    costs: Table
    verdicts: Table
    contests: Sequence[ContestView]
    picture: str
    legend: str


def benchmark_views(
    comparison: Comparison, *, examples: int = 6, against: Against | None = None
) -> list[BenchmarkView]:
    """Every benchmark that two runs or more were judged on; ``examples`` of wins and of losses each.

    ``against`` chooses what score is drawn against; else the first that all of its runs know.
    """
    names = dict.fromkeys(contest.benchmark for contest in comparison.contests)
    return [_benchmark(comparison, name, examples, against) for name in names]


def _benchmark(comparison: Comparison, name: str, examples: int, against: Against | None) -> BenchmarkView:
    judged = {run.name: run.results[name] for run in comparison.runs if name in run.results}
    contests = [contest for contest in comparison.contests if contest.benchmark == name]
    samples = _samples_again(next(iter(judged.values()))) if examples else {}
    picture, legend = _picture(name, judged, against)
    return BenchmarkView(
        name,
        _runs_table(judged),
        _cost_table(judged),
        _verdict_table(contests),
        [
            ContestView(contest, _task_table(contest), *_examples(contest, judged, samples, examples))
            for contest in contests
        ],
        base64.b64encode(picture).decode() if picture else "",
        legend,
    )


def _runs_table(judged: Mapping[str, PastResult]) -> Table:
    rows = [
        ["run", "figure", "value", "95 % interval", "questions", "unparsed", "guessed", "missing", "failed"]
    ]
    for name, result in judged.items():
        states = [answer.score.state for answer in result.answers.values()]
        value, ends = _told(result)
        counts = [str(states.count(state)) for state in ("unparsed", "guessed", "missing", "failed")]
        rows.append([name, result.headline, value, ends, str(len(states)), *counts])
    protocols = dict.fromkeys(
        f"Scored by the protocol {found['name']}: {found['source']}"
        for result in judged.values()
        if (found := result.entry.get("protocol"))
    )
    return Table("Figures", rows, list(protocols))


def _told(result: PastResult) -> tuple[str, str]:
    found, whole = result.entry["intervals"][result.headline], whole_of(result.unit)
    scale, digits, sign = (100 / whole, 1, " %") if whole else (1.0, 3, f" {result.unit}")
    value, low, high = (scale * float(found[end]) for end in ("value", "low", "high"))
    if found.get("method") == UNDETERMINED:
        return f"{value:.{digits}f}{sign}", NOT_DETERMINED
    return f"{value:.{digits}f}{sign}", f"{low:.{digits}f} to {high:.{digits}f}"


def _cost_table(judged: Mapping[str, PastResult]) -> Table:
    columns: Mapping[str, Callable[[Mapping[str, Any], Mapping[str, Any]], Any]] = {
        "parameters (M)": lambda cost, _: _over(cost.get("parameters"), 1e6),
        "active (M)": lambda cost, _: _over(cost.get("active_parameters"), 1e6),
        "visual tokens": lambda cost, _: cost.get("visual_tokens"),
        "GFLOP a question": lambda cost, _: _over(cost.get("flops"), 1e9),
        "tokens/s": lambda _, clock: clock.get("tokens_per_second"),
        "s a question": lambda _, clock: clock.get("seconds_per_question"),
        "peak memory (GiB)": lambda _, clock: _over(clock.get("peak_bytes"), 2**30),
    }
    rows = [["run", *columns]]
    for name, result in judged.items():
        found = (read(result.entry.get("cost", {}), result.timing) for read in columns.values())
        rows.append([name, *(_number(value) for value in found)])
    return Table("Cost", rows)


def _over(value: float | None, size: float) -> float | None:
    return None if value is None else value / size


def _number(value: float | None) -> str:
    return "not known" if value is None else f"{value:.4g}"


def _verdict_table(contests: Sequence[Contest]) -> Table:
    rows = [["runs", "difference [95 % interval]", "won", "lost", "equal", "p, corrected", "test", "verdict"]]
    for each in contests:
        unit = each.unit if each.figure else ""
        gap = told_gap(each.figure or each.questions.interval, unit)
        counts = [str(count) for count in (each.questions.wins, each.questions.losses, each.questions.ties)]
        pair = f"{each.second} minus {each.first}"
        rows.append([pair, gap, *counts, told_chance(each.adjusted), each.test, each.state])
    return Table("Differences", rows)


def _task_table(contest: Contest) -> Table:
    rows = [["task", "difference [95 % interval]", "won", "lost", "equal", "p, corrected"]]
    for task, each in contest.tasks.items():
        counts = [str(count) for count in (each.wins, each.losses, each.ties)]
        chance = told_chance(each.adjusted)
        rows.append([task or "(no task)", told_gap(each.interval, ""), *counts, chance])
    return Table(f"{contest.second} minus {contest.first}, by task", rows)


def _samples_again(result: PastResult) -> Mapping[str, Sample]:
    """The questions with their pictures, where their files are still there; else nothing."""
    try:
        settings = read_part(BENCHMARKS, dict(result.entry["settings"]), "benchmark")
        benchmark = BENCHMARKS.get(settings.kind)(settings)
        return {sample.id: sample for sample in benchmark.samples()} if benchmark.canned else {}
    except (VlmixError, OSError):
        return {}


def _examples(
    contest: Contest, judged: Mapping[str, PastResult], samples: Mapping[str, Sample], most: int
) -> tuple[list[Example], list[Example]]:
    """Questions that the second run answered better than the first, and worse, the largest gaps first."""
    a, b = judged[contest.first].answers, judged[contest.second].answers
    gaps = {name: b[name].score.value - mine.score.value for name, mine in a.items() if name in b}

    def some(sign: int) -> list[Example]:
        found = [name for name, gap in gaps.items() if sign * gap > 0]
        chosen = sorted(found, key=lambda name: -abs(gaps[name]))[:most]
        return [_example(name, judged[contest.first], judged[contest.second], samples) for name in chosen]

    return some(1), some(-1)


def _example(name: str, a: PastResult, b: PastResult, samples: Mapping[str, Sample]) -> Example:
    mine, theirs, sample = a.answers[name], b.answers[name], samples.get(name)
    same = sample is not None and not sample.defect and question_of(sample).turns[-1].text == mine.question
    images = sample.images[:_PICTURES] if sample is not None and same else ()
    return Example(
        shortened(mine.question.strip()),
        shortened(" or ".join(mine.targets)),
        shortened((mine.error and f"failed: {mine.error}") or mine.answer or "(nothing)"),
        shortened((theirs.error and f"failed: {theirs.error}") or theirs.answer or "(nothing)"),
        mine.score.task,
        [picture_of(image) for image in images],
    )


def _picture(name: str, judged: Mapping[str, PastResult], against: Against | None) -> tuple[bytes, str]:
    """Score against the first cost that two runs or more know, and which number is which run."""
    for axis in (against,) if against else AXES:
        priced = [found for run, result in judged.items() if (found := _priced(run, result, axis))]
        if len(priced) >= 2:
            result = next(iter(judged.values()))
            unit = "%" if whole_of(result.unit) else result.unit
            picture = pareto_picture(name, priced, AXES[axis], f"{result.headline} ({unit})")
            legend = "; ".join(f"{number}: {run.name}" for number, run in enumerate(priced, 1))
            return picture, legend
    return b"", ""


def _priced(name: str, result: PastResult, axis: Against) -> Priced | None:
    cost = result.entry.get("cost", {})
    found = {
        "flops": _over(cost.get("flops"), 1e9),
        "tokens": cost.get("visual_tokens"),
        "seconds": result.timing.get("seconds_per_question"),
    }[axis]
    if found is None:
        return None
    whole = whole_of(result.unit)
    interval, scale = result.entry["intervals"][result.headline], 100 / whole if whole else 1.0
    value, low, high = (scale * float(interval[end]) for end in ("value", "low", "high"))
    return Priced(name, float(found), value, low, high)
