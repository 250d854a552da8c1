"""A search in one folder: rounds of trials until the strategy is done; killed at any point it goes on."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from rich.console import Console

from vlmix.core.errors import InputError, InterruptedRunError, VlmixError
from vlmix.core.files import LOCK, read_json, recover, run_lock, write_json
from vlmix.core.parts import read_part
from vlmix.search.compose import CHECKS, SHARED, Composer
from vlmix.search.executors import Executor, Job, Kind, executor_for
from vlmix.search.grid_file import load_grid
from vlmix.search.ledger import Entry, Ledger
from vlmix.search.objective import check_sources, read_objective
from vlmix.search.points import Point, Space
from vlmix.search.settings import Grid
from vlmix.search.strategies import STRATEGIES

if TYPE_CHECKING:
    from vlmix.search.evidence import Evidence
    from vlmix.search.report import Summary
    from vlmix.search.strategies._base import Found, Round, Strategy

LEDGER, TRIALS, LOGS = "ledger.jsonl", "trials", "logs"
_GRID: Final = "grid.json"
_OURS: Final = {LEDGER, TRIALS, SHARED, CHECKS, LOGS, _GRID, LOCK}


def run(
    grid: str | Path | Grid,
    out: str | Path,
    *,
    jobs: int = 1,
    executor: Kind = "processes",
    console: Console | None = None,
) -> Summary:
    """Search what ``grid`` (a file, a shipped name or a grid that was read) says in the folder ``out``.

    Started again in the same folder it repeats no finished trial, and goes on with one that was cut off.
    ``jobs`` trials run at once. The summary is written there as search.json, search.md and search.html.

    Raises:
        InputError: if grid or recipe are wrong, or ``out`` holds something that is no search.
        RunLockedError: if another process searches there.
        InterruptedRunError: if somebody stopped it; what was done is kept.
        VlmixError: if every trial of a round failed, or the machine is at fault.

    """
    read = grid if isinstance(grid, Grid) else load_grid(grid)
    search = _Search.plan(read, Path(out), jobs, executor, console or Console(quiet=True))
    with run_lock(search.out):
        try:
            return search.run()
        except (KeyboardInterrupt, InterruptedRunError) as error:
            raise InterruptedRunError(
                f"stopped: {len(search.ledger.entries)} finished trials are kept in {search.out}. Run the "
                "same command again to go on"
            ) from error


@dataclass
class _Search:
    """A search that can begin; everything was checked and nothing written."""

    out: Path
    composer: Composer
    strategy: Strategy
    space: Space
    evidence: Evidence
    executor: Executor
    console: Console
    ledger: Ledger
    begun: float = field(default_factory=time.perf_counter)
    trained: int = 0

    @staticmethod
    def plan(grid: Grid, out: Path, jobs: int, kind: Kind, console: Console) -> _Search:
        settings = read_part(STRATEGIES, grid.strategy, "strategy")
        strategy = STRATEGIES.get(settings.kind)(settings)
        space, composer = Space.of(grid, jobs), Composer.of(grid)
        strategy.check(space)
        from vlmix.search.evidence import Evidence
        from vlmix.search.trial import benchmark_names, open_benchmark

        names = benchmark_names(composer.base)
        objective = read_objective(grid.objective)
        check_sources(objective, names)
        _check_parts(composer, space)
        _check_folder(out)
        opened = [open_benchmark(judged.benchmark) for judged in composer.base.evals]
        evidence = Evidence(objective, grid.stop, out / TRIALS, dict(zip(names, opened, strict=True)))
        executor = executor_for(kind, jobs)
        return _Search(out, composer, strategy, space, evidence, executor, console, Ledger(out / LEDGER))

    @property
    def grid(self) -> Grid:
        return self.composer.grid

    def run(self) -> Summary:
        for name in ("", TRIALS, CHECKS):
            recover(self.out / name)
        for name in (TRIALS, SHARED, LOGS):
            (self.out / name).mkdir(exist_ok=True)
        write_json(self.out / _GRID, self.grid.model_dump(mode="json"))
        self.ledger = Ledger.open(self.out / LEDGER)
        self.evidence.entries = self.ledger.entries
        self._tell_begin()
        start = self._start()
        found = self._search()
        return self._summary(found, start)

    def _search(self) -> Found:
        rounds = self.strategy.rounds(self.space, self.evidence)
        try:
            asked = next(rounds)
            while True:
                self._round(asked)
                asked = next(rounds)
        except StopIteration as ended:
            return cast("Found", ended.value)

    def _round(self, asked: Round) -> None:
        seeds, jobs = self.grid.seeds, dict[str, Job]()
        for point in asked.points:
            self.evidence.keys[point] = tuple(self.composer.key(point, seed) for seed in seeds)
            for seed, key in zip(seeds, self.evidence.keys[point], strict=True):
                if key not in self.ledger.entries:
                    jobs.setdefault(key, self._job(point, seed, key))
        self._say(f"[bold]{_plain(asked.title)}[/]: {len(asked.points)} choices, {len(jobs)} trials to run")
        self.executor.run(list(jobs.values()), self._done)
        if all(self.evidence.failed(point) for point in asked.points):
            errors = [e.error for point in asked.points for e in self.evidence.entries_of(point) if e.error]
            raise VlmixError(
                f"no trial of this round could be trained ({asked.title}). The first said: {errors[0]}"
            )
        for point in asked.points:
            found = self.evidence.estimate(point)
            ends = "" if found.low is None else f"  [{found.low:.4g}, {found.high:.4g}]"
            self._say(f"  {_plain(point.label)}  objective {found.value:.4g}{_plain(ends)}")

    def _job(self, point: Point, seed: int, key: str) -> Job:
        shared, done = (self.out / SHARED).resolve(), self.ledger.entries.values()
        there = {f"{name} {entry.seed}" for entry in done if not entry.error for name in entry.encoders}
        return Job(
            key=key,
            recipe=self.composer.recipe(point, seed, shared),
            folder=(self.out / TRIALS / key).resolve(),
            log=(self.out / LOGS / f"{key}.txt").resolve(),
            told={**point.to_json(), "seed": seed},
            needs=frozenset(f"{name} {seed}" for name in self.composer.aligned(point)) - there,
            label=f"{point.label}, seed {seed}",
        )

    def _done(self, job: Job, entry: Entry) -> None:
        if entry.error:
            self.ledger.note_failure(entry)
        else:
            self.ledger.add(entry)
        self.trained += 1
        spent = time.perf_counter() - self.begun
        most = self.strategy.most(self.space) * len(self.grid.seeds)
        left = max(0, most - len({key for keys in self.evidence.keys.values() for key in keys}))
        waiting = sum(key not in self.ledger.entries for keys in self.evidence.keys.values() for key in keys)
        about = (left + waiting) * spent / self.trained
        what = f"failed: {entry.error}" if entry.error else f"{entry.seconds.total:.0f} s"
        self._say(
            f"  trial {len(self.ledger.entries)}: {_plain(job.label)}  {_plain(what)}  "
            f"(at most {_minutes(about)} left)"
        )

    def _start(self) -> float:
        """Train what all trials begin with, unless it is there; the seconds it took."""
        planned = self.composer.start(self.out / SHARED)
        if planned is None:
            return 0.0
        from vlmix.search.start import make_start

        recipe, folder = planned
        self._say(f"[bold]start[/]: the language model and the encoders that all trials begin with, {folder}")
        return make_start(recipe, folder, self.out / LOGS / "start.txt")

    def _summary(self, found: Found, start: float) -> Summary:
        from vlmix.search.report import Summary, write_summary
        from vlmix.search.verify import verified

        keys = {key for keys in self.evidence.keys.values() for key in keys}
        entries = [entry for key, entry in self.ledger.entries.items() if key in keys]
        made = self.ledger.made()
        checks = verified(self.composer, found.best, entries, made, self.out, self._say_plain)
        summary = Summary.of(self.grid, found, self.evidence, self.ledger, entries, start, checks)
        if not self.trained:
            self._say(
                f"nothing was left to train: all {len(entries)} trials were done. The report is written anew"
            )
        write_summary(self.out, summary)
        return summary

    def _tell_begin(self) -> None:
        most, seeds = self.strategy.most(self.space), self.grid.seeds
        there = len(self.ledger.entries)
        more = f"; {there} trials are there already" if there else ""
        self._say(
            f"[bold]{_plain(self.grid.name)}[/]: {self.grid.strategy['kind']}, at most {most} choices x "
            f"{len(seeds)} seeds, objective {_plain(self.grid.objective)}{more}"
        )

    def _say_plain(self, text: str) -> None:
        self._say(_plain(text))

    def _say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, highlight=False)


def _check_parts(composer: Composer, space: Space) -> None:
    """Read every part of the recipe with each encoder alone, or as it is, before anything is made."""
    from vlmix.train.build import check_parts, recipe_config

    alone = [space.point([name]) for name in space.pool] if not (space.axes or space.mixtures) else []
    for point in alone or [Point()]:
        recipe = composer.recipe(point, composer.grid.seeds[0], Path(SHARED))
        check_parts(recipe)
        if composer.grid.start is None:
            recipe_config(recipe).plan()
    start = composer.start(Path(SHARED))
    if start is not None:
        check_parts(start[0])
        recipe_config(start[0]).plan()


def _check_folder(out: Path) -> None:
    """Refuse a folder that holds what is no search.

    Raises:
        InputError: with the remedy.

    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; a search needs a folder. Choose another --out")
    strangers = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if strangers and not (out / _GRID).is_file() and {*strangers} - _OURS:
        raise InputError(f"{out} holds {', '.join(strangers[:5])} and is no search. Choose another --out")
    if (out / _GRID).is_file() and "strategy" not in _mapping(read_json(out / _GRID)):
        raise InputError(f"{out / _GRID} is not of a search. Choose another --out")


def _mapping(raw: Any) -> dict[str, Any]:
    return raw if isinstance(raw, dict) else {}


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
