"""Runs side by side on the same questions: who is ahead, by how much, and whether that can be told at all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from typing import Any, Final, Literal

import numpy as np

from vlmix.core.errors import InputError
from vlmix.evals.jackknife import jackknife_error, whole_of
from vlmix.evals.paired import Difference, difference, holm
from vlmix.evals.past_runs import PastResult, PastRun
from vlmix.evals.statistics import Interval
from vlmix.evals.student import inside, quantile

LEVEL: Final = 0.05
SMALLEST: Final = 1e-3
State = Literal["ahead", "behind", "undecided"]
_NO_MATTER: Final = frozenset({"path"})
"""Settings that say where a benchmark lies and not what is asked."""


@dataclass(frozen=True, slots=True)
class Contest:
    """Two runs on one benchmark, the second minus the first throughout.

    ``figure`` is the headline's difference in its own ``unit``, None where the two cannot be paired by it:
    then ``questions``, the mean score over all common questions, decides. ``adjusted`` is the deciding p
    after Holm's correction over all contests; those of ``tasks`` are corrected over the tasks.
    """

    benchmark: str
    first: str
    second: str
    headline: str
    unit: str
    figure: Interval | None
    questions: Difference
    tasks: Mapping[str, Difference]
    p: float
    test: str
    remarks: tuple[str, ...]
    adjusted: float = 1.0
    state: State = "undecided"
    verdict: str = ""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Two runs on one benchmark that mean nothing side by side, and why."""

    benchmark: str
    first: str
    second: str
    reason: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """Every contest there is between the runs, those that were refused, and the runs themselves."""

    runs: Sequence[PastRun]
    contests: Sequence[Contest]
    refused: Sequence[Refusal] = field(default_factory=list[Refusal])

    def to_json(self) -> dict[str, Any]:
        """For programs: contests with their tests, and what was not compared."""
        return {
            "runs": [run.name for run in self.runs],
            "level": LEVEL,
            "contests": [asdict(contest) for contest in self.contests],
            "refused": [asdict(refusal) for refusal in self.refused],
        }


def compare_runs(runs: Sequence[PastRun], baseline: str = "", seed: int = 0) -> Comparison:
    """Compare every run with ``baseline``, or with every other, on each benchmark that both were judged on.

    Raises:
        InputError: if there are fewer than two runs, the baseline is none of them, or no two of them can be
            compared on anything.

    """
    if len(runs) < 2:
        raise InputError("a comparison needs at least two runs")
    names = [run.name for run in runs]
    if baseline and baseline not in names:
        raise InputError(f"the baseline {baseline} is none of the runs: {', '.join(names)}")
    base = next((run for run in runs if run.name == baseline), None)
    pairs = [(base, run) for run in runs if run is not base] if base else list(combinations(runs, 2))
    contests: list[Contest] = []
    refused: list[Refusal] = []
    for first, second in pairs:
        for benchmark in [name for name in first.results if name in second.results]:
            a, b = first.results[benchmark], second.results[benchmark]
            try:
                contests.append(_contest(benchmark, (first.name, a), (second.name, b), seed))
            except InputError as error:
                refused.append(Refusal(benchmark, first.name, second.name, str(error)))
    if not contests:
        why = "; ".join(f"{each.benchmark}: {each.reason}" for each in refused)
        raise InputError(
            f"these runs cannot be compared. {why or 'They were judged on different benchmarks'}"
        )
    adjusted = holm([contest.p for contest in contests])
    decided = [_decided(each, p, len(contests)) for each, p in zip(contests, adjusted, strict=True)]
    return Comparison(runs, decided, refused)


def _contest(
    benchmark: str, one: tuple[str, PastResult], other: tuple[str, PastResult], seed: int
) -> Contest:
    (first, a), (second, b) = one, other
    _refuse(a, b)
    common = _common(a, b)
    mine, theirs = ([s for s in each.counted if s.sample_id in common] for each in (a, b))
    questions = difference(theirs, mine, seed)
    tasks = {
        task: difference([s for s in theirs if s.task == task], [s for s in mine if s.task == task], seed)
        for task in sorted({s.task for s in mine})
    }
    adjusted = holm([each.p for each in tasks.values()])
    tasks = {name: replace(each, adjusted=p) for (name, each), p in zip(tasks.items(), adjusted, strict=True)}
    whole = len(common) == len(a.answers) == len(b.answers)
    figure, p, test = _figure(a, b, questions) if whole else (None, questions.p, questions.test)
    remarks = _remarks((first, a), (second, b), len(common))
    if figure is None:
        remarks.append(f"{a.headline} cannot be paired here: the mean score of the questions decides")
    return Contest(
        benchmark, first, second, a.headline, a.unit, figure, questions, tasks, p, test, tuple(remarks)
    )


def _refuse(a: PastResult, b: PastResult) -> None:
    if a.protocol != b.protocol:
        raise InputError(
            f"one was scored by {a.protocol or 'no named protocol'}, the other by "
            f"{b.protocol or 'no named protocol'}: scores by different rules are no measure of each other"
        )
    if a.headline != b.headline:
        raise InputError(f"the headline of one is {a.headline}, of the other {b.headline}")


def _common(a: PastResult, b: PastResult) -> set[str]:
    """The ids of questions that both were asked.

    Raises:
        InputError: if there is none, or one id is two questions.

    """
    common = {*a.answers} & {*b.answers}
    if not any(a.answers[name].score.counted for name in common):
        raise InputError("they have no question in common")
    other = sorted(name for name in common if a.answers[name].asked != b.answers[name].asked)
    if other:
        raise InputError(
            f"{len(other)} of {len(common)} ids stand for different questions, such as {other[0]!r}: they "
            "were judged on different sets"
        )
    return common


def _figure(a: PastResult, b: PastResult, questions: Difference) -> tuple[Interval | None, float, str]:
    """The headline's own difference where it can be had, and the p that decides."""
    name = a.headline
    values = [float(each.entry["figures"][name]) for each in (a, b)]
    if scale := _scale_of_mean(a, b, values):
        found = questions.interval
        value, low, high = (scale * end for end in (found.value, found.low, found.high))
        return replace(found, value=value, low=low, high=high), questions.p, questions.test
    first, second = (np.array(each.replicates.get(name, [])) for each in (a, b))
    if a.blocks != b.blocks or len(first) != len(second) or len(first) < 2:
        return None, questions.p, questions.test
    error, degrees = jackknife_error(second - first)
    gap, n = values[1] - values[0], len(a.answers)
    if error <= 0:
        return None, questions.p, questions.test
    half = quantile(1 - LEVEL, degrees) * error
    interval = Interval(gap, gap - half, gap + half, n, questions.interval.groups, "paired jackknife")
    return interval, max(0.0, 1 - inside(gap / error, degrees)), "paired jackknife, Student's t"


def _scale_of_mean(a: PastResult, b: PastResult, values: Sequence[float]) -> float | None:
    """What the mean score is multiplied by to give the headline, None where the headline is no mean."""
    if any(each.entry["intervals"][a.headline]["method"].startswith("jackknife") for each in (a, b)):
        return None
    scale = whole_of(a.unit) or 1.0
    means = [math.fsum(s.value for s in each.counted) / len(each.counted) for each in (a, b)]
    same = (math.isclose(v, scale * m, abs_tol=1e-5 * scale) for v, m in zip(values, means, strict=True))
    return scale if all(same) else None


def _remarks(one: tuple[str, PastResult], other: tuple[str, PastResult], common: int) -> list[str]:
    """What a reader has to know of two runs that can be compared all the same."""
    (first, a), (second, b) = one, other
    found: list[str] = []
    for name, each in (one, other):
        if left := len(each.answers) - common:
            found.append(
                f"{left} of {len(each.answers)} questions of {name} are not in the other run: left out"
            )
        if failed := sum(answer.score.state == "failed" for answer in each.answers.values()):
            found.append(f"{failed} answers of {name} failed and count as wrong")
    for part, what in (
        ("settings", "benchmark settings"),
        ("decoding", "decoding"),
        ("versions", "versions"),
    ):
        mine, theirs = a.entry[part], b.entry[part]
        keys = sorted(key for key in {*mine, *theirs} - _NO_MATTER if mine.get(key) != theirs.get(key))
        if keys:
            told = ", ".join(f"{key} {mine.get(key)} against {theirs.get(key)}" for key in keys)
            found.append(f"different {what} ({first} against {second}): {told}")
    return found


def _decided(contest: Contest, adjusted: float, contests: int) -> Contest:
    interval, unit = contest.figure or contest.questions.interval, contest.unit if contest.figure else ""
    clear = adjusted < LEVEL and (interval.low > 0 or interval.high < 0)
    state: State = "undecided" if not clear else "ahead" if interval.value > 0 else "behind"
    chance = f"p {told_chance(adjusted)}" if adjusted < SMALLEST else f"p = {told_chance(adjusted)}"
    if contests > 1:
        chance += f" after Holm's correction for {contests} comparisons"
    if state == "undecided":
        verdict = f"undecided: {contest.second} minus {contest.first} is {told_gap(interval, unit)}; {chance}"
    else:
        ahead, behind = contest.second, contest.first
        shown = interval
        if state == "behind":
            ahead, behind = behind, ahead
            shown = replace(interval, value=-interval.value, low=-interval.high, high=-interval.low)
        verdict = f"{ahead} is ahead of {behind} by {told_gap(shown, unit)}; {chance}"
    return replace(contest, adjusted=adjusted, state=state, verdict=verdict)


def told_gap(interval: Interval, unit: str) -> str:
    """A difference with its ends: in points of a hundred where the unit is a share, else in its own unit."""
    whole = whole_of(unit)
    scale, name, digits = (100 / whole, "points", 1) if whole else (1.0, unit, 3)
    value, low, high = (scale * end for end in (interval.value, interval.low, interval.high))
    return f"{value:.{digits}f} {name} [{low:.{digits}f}, {high:.{digits}f}]"


def told_chance(p: float) -> str:
    """A p to two digits, none smaller than can be meant."""
    return f"below {SMALLEST:g}" if p < SMALLEST else f"{p:.2g}"
