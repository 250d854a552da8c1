"""Where trials run: in this process, in several of their own, or on a cluster that Ray runs. No torch.

Trials that need an encoder which another trial is just aligning wait for it, so that no two make the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Literal, cast

from rich.console import Console

from vlmix.core.errors import DiskFullError, InterruptedRunError, RunLockedError, VlmixError
from vlmix.core.extras import extra
from vlmix.core.settings import read_settings
from vlmix.search.ledger import Entry
from vlmix.train.recipe import Recipe

Kind = Literal["processes", "ray"]
WORKER: Final = "vlmix.search.worker"
_ERRORS: Final = {each.exit_code: each for each in (DiskFullError, RunLockedError, InterruptedRunError)}
_TAIL: Final = 2000  # letters of a worker's last words


@dataclass(frozen=True, slots=True)
class Job:
    """A trial that is to be run: its recipe in its folder, and ``told``, what else its entry says.

    ``needs`` names the encoders with their seed that are aligned in it, if nobody did before.
    """

    key: str
    recipe: Recipe
    folder: Path
    log: Path
    told: Mapping[str, Any]
    needs: frozenset[str]
    label: str


Done = Callable[[Job, Entry], None]


class Executor(ABC):
    """Runs jobs, and says of each when it is done."""

    @abstractmethod
    def run(self, jobs: Sequence[Job], done: Done) -> None:
        """Run all of them; ``done`` is called in this process, one at a time.

        Raises:
            VlmixError: if the machine is at fault, or somebody stopped it. Trials in progress were saved.

        """


def executor_for(kind: Kind, jobs: int) -> Executor:
    """The executor that runs ``jobs`` trials at once.

    Raises:
        InputError: if it needs a package that is not installed; says how to get it.

    """
    if kind == "ray":
        return OnRay(jobs)
    return InProcess() if jobs == 1 else InProcesses(jobs)


class InProcess(Executor):
    """One after the other, here."""

    def run(self, jobs: Sequence[Job], done: Done) -> None:
        """Run them in order."""
        from vlmix.search.trial import run_trial

        for job in jobs:
            with job.log.open("a", encoding="utf-8") as log:
                told = Console(file=log, width=160)
                entry = run_trial(job.key, job.recipe, job.folder, job.told, told)
            done(job, entry)


class InProcesses(Executor):
    """Several at once, each in a process of its own with its share of the machine's cores."""

    def __init__(self, width: int) -> None:
        self.width, self.threads = width, max(1, (os.cpu_count() or 1) // width)

    def run(self, jobs: Sequence[Job], done: Done) -> None:
        """Run them; where this process ends, the others save what they have and end too."""
        alive: list[subprocess.Popen[str]] = []
        with ThreadPoolExecutor(self.width) as pool:
            try:
                schedule(jobs, self.width, lambda job: pool.submit(self._one, job, alive), done)
            finally:
                for process in alive:
                    _let_go(process.stdin)

    def _one(self, job: Job, alive: list[subprocess.Popen[str]]) -> Entry:
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        with job.log.open("a", encoding="utf-8") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                start_new_session=True,  # Ctrl-C is this process's to handle
            )
            alive.append(process)
            with process:
                told, answers = cast("IO[str]", process.stdin), cast("IO[str]", process.stdout)
                told.write(as_line(job))
                told.flush()
                said = answers.read()
        if process.returncode:
            raise _error(job, process.returncode)
        return read_settings(Entry, json.loads(said))


class OnRay(Executor):
    """Wherever Ray has room; every machine must see the search's folder under the same path."""

    def __init__(self, width: int) -> None:
        with extra("ray", "--executor ray"):
            import ray  # pyright: ignore[reportMissingImports]

        self.width, self._ray = width, ray

    def run(self, jobs: Sequence[Job], done: Done) -> None:
        """Hand them to Ray."""
        from vlmix.search.worker import run_elsewhere

        if not self._ray.is_initialized():
            self._ray.init(log_to_driver=False)
        threads = max(1, (os.cpu_count() or 1) // self.width)
        remote = self._ray.remote(num_cpus=threads, max_calls=1)(run_elsewhere)

        def submit(job: Job) -> Future[Entry]:
            return self._ray_future(remote.remote(as_line(job), str(job.log), threads))

        schedule(jobs, self.width, submit, done)

    def _ray_future(self, reference: Any) -> Future[Entry]:
        told, found = reference.future(), Future[Entry]()

        def settle(ended: Future[str]) -> None:
            if (error := ended.exception()) is not None:
                found.set_exception(getattr(error, "cause", None) or error)
            else:
                found.set_result(read_settings(Entry, json.loads(ended.result())))

        told.add_done_callback(settle)
        return found


def as_line(job: Job) -> str:
    """A job as one line of JSON, as a worker reads it."""
    recipe = job.recipe.model_dump(mode="json")
    told = {"key": job.key, "recipe": recipe, "folder": str(job.folder), "told": dict(job.told)}
    return json.dumps(told) + "\n"


def schedule(jobs: Sequence[Job], width: int, submit: Callable[[Job], Future[Entry]], done: Done) -> None:
    """Run at most ``width`` at once, and no two that would make the same piece.

    ``submit`` begins a job; ``done`` is called here when it ended.

    Raises:
        VlmixError: as the job that failed first.

    """
    left, running, made = list(jobs), dict[Future[Entry], Job](), set[str]()
    while left or running:
        for job in list(left):
            busy = {name for other in running.values() for name in other.needs} - made
            if len(running) < width and not (job.needs - made) & busy:
                running[submit(job)] = job
                left.remove(job)
        ended, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in ended:
            job = running.pop(future)
            done(job, future.result())
            made |= job.needs


def _let_go(pipe: IO[str] | None) -> None:
    """Close the pipe that tells a worker that somebody waits for it."""
    if pipe is not None and not pipe.closed:
        pipe.close()


def _error(job: Job, code: int) -> VlmixError:
    said = job.log.read_text(encoding="utf-8")[-_TAIL:].strip().splitlines()
    last = said[-1] if said else f"it ended with {code}"
    return _ERRORS.get(code, VlmixError)(f"trial {job.label}: {last} (all it said: {job.log})")
