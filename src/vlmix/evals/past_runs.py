"""Runs that were judged before, read back from their report folders: figures, answers, cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vlmix.core.errors import InputError
from vlmix.core.sample import Score
from vlmix.evals.report import ANSWERS, REPLICATES, RESULTS, SCHEMA, TIMING

_UNUSABLE: Final = (KeyError, TypeError, ValueError, AttributeError, RecursionError)


@dataclass(frozen=True, slots=True)
class PastAnswer:
    """One question of a judged run, and what became of it."""

    score: Score
    question: str
    targets: tuple[str, ...]
    answer: str
    error: str
    tokens: int

    @property
    def asked(self) -> tuple[str, tuple[str, ...], str]:
        """What makes it the same question in another run."""
        return self.question, self.targets, self.score.task


@dataclass(frozen=True, slots=True)
class PastResult:
    """One benchmark of a judged run: its entry of ``results.json``, and its answers by sample id.

    ``replicates`` are those of figures that are no means, dealt as ``blocks`` says; ``timing`` is empty
    where the clock's file is not there.
    """

    entry: Mapping[str, Any]
    answers: Mapping[str, PastAnswer]
    replicates: Mapping[str, Sequence[float]]
    blocks: str
    timing: Mapping[str, Any]

    @property
    def headline(self) -> str:
        """The figure that stands for all."""
        return self.entry["headline"]

    @property
    def unit(self) -> str:
        """The headline's unit; empty for a share of 1."""
        return self.entry.get("units", {}).get(self.headline, "")

    @property
    def protocol(self) -> str:
        """The rule that scored the answers; empty where a benchmark has one only."""
        return self.entry.get("protocol", {}).get("name", "")

    @property
    def counted(self) -> list[Score]:
        """The scores of questions that count for themselves."""
        return [each.score for each in self.answers.values() if each.score.counted]


@dataclass(frozen=True, slots=True)
class PastRun:
    """A run by the name it was given on the command line, and its results by benchmark."""

    name: str
    results: Mapping[str, PastResult]


def read_runs(paths: Sequence[Path]) -> list[PastRun]:
    """Read report folders, or run folders that hold some.

    Raises:
        InputError: if one is no such folder, is damaged, or is named twice.

    """
    real = [path.resolve() for path in paths]
    if twice := [path for index, path in enumerate(paths) if real[index] in real[:index]]:
        raise InputError(f"{twice[0]} is named twice: a run is no different from itself")
    return [read_run(path) for path in paths]


def read_run(path: Path) -> PastRun:
    """Read a report folder, or every report of a run folder.

    Raises:
        InputError: if there is none, one is damaged, or two of them judge the same benchmark.

    """
    if (path / RESULTS).is_file():
        return PastRun(str(path), _read_report(path))
    reports = [report for report in sorted(path.glob("report*")) if (report / RESULTS).is_file()]
    if not reports:
        raise InputError(
            f"{path} holds no {RESULTS}: name a folder that `vlmix eval` or `vlmix train` wrote a report into"
        )
    found: dict[str, PastResult] = {}
    for report in reports:
        results = _read_report(report)
        if both := sorted({*found} & {*results}):
            raise InputError(
                f"{path} holds several reports on {both[0]}: name the one that is meant, such as {report}"
            )
        found |= results
    return PastRun(str(path), found)


def _read_report(folder: Path) -> dict[str, PastResult]:
    results = _json(folder / RESULTS)
    try:
        if results["schema"] != SCHEMA:
            raise ValueError(f"its schema is {results['schema']!r}, not {SCHEMA!r}")
        entries = list(results["results"])
        rows = [_answer(row) for row in _lines(folder / ANSWERS)]
        sizes = [int(entry["n"]) for entry in entries]
        if sum(sizes) != len(rows):
            raise ValueError(f"{sum(sizes)} questions were asked, and {ANSWERS} has {len(rows)}")
        timing = _json(folder / TIMING) if (folder / TIMING).is_file() else {}
        more = (
            _json(folder / REPLICATES)["results"] if (folder / REPLICATES).is_file() else [{}] * len(entries)
        )
        found: dict[str, PastResult] = {}
        for entry, size, extra in zip(entries, sizes, more, strict=True):
            own, rows = rows[:size], rows[size:]
            name, count = str(entry["benchmark"]), 1
            while name in found:
                count += 1
                name = f"{entry['benchmark']} ({count})"
            _check(entry)
            found[name] = PastResult(
                entry,
                {answer.score.sample_id: answer for answer in own},
                {key: [float(each) for each in values] for key, values in extra.get("figures", {}).items()},
                str(extra.get("blocks", "")),
                dict(timing.get(entry["benchmark"], {})),
            )
    except _UNUSABLE as error:
        raise InputError(
            f"{folder} is a damaged report: {type(error).__name__} {error}. Judge again"
        ) from None
    return found


def _check(entry: Mapping[str, Any]) -> None:
    """Touch what is read later, so that a damaged entry is told of here."""
    name = entry["headline"]
    float(entry["figures"][name])
    for end in ("value", "low", "high"):
        float(entry["intervals"][name][end])
    for part in ("settings", "decoding", "versions", "tasks"):
        dict(entry[part])


def _answer(row: Mapping[str, Any]) -> PastAnswer:
    value = float(row["value"])
    if not 0 <= value <= 1:
        raise ValueError(f"the value of {row['sample_id']!r} is {value}, not in 0..1")
    score = Score(
        str(row["sample_id"]),
        value,
        str(row["parsed"]),
        str(row["task"]),
        str(row["group"]),
        state=row.get("state", "failed" if row["error"] else "read"),
        counted=bool(row.get("counted", True)),
    )
    targets = tuple(map(str, row["targets"]))
    return PastAnswer(
        score, str(row["question"]), targets, str(row["answer"]), str(row["error"]), int(row["tokens"])
    )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def _lines(path: Path) -> list[Any]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
