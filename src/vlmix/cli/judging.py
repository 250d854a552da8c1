"""``vlmix eval`` behind its options: answers that are kept, shared among processes, and judged once."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from vlmix.cli.asking import AskingProgress
from vlmix.cli.console import err
from vlmix.cli.flow import Asked, judge_watched
from vlmix.cli.subject import Subject
from vlmix.core.errors import InputError, InterruptedRunError
from vlmix.core.files import recover, run_lock
from vlmix.core.interfaces import Benchmark
from vlmix.core.parallel import ParallelSettings
from vlmix.core.sample import Decoding, Json, Responder
from vlmix.evals.answer_files import read_answers
from vlmix.evals.completions import ServerSettings
from vlmix.evals.report import UNFINISHED, check_report_folder
from vlmix.evals.responder import CannedResponder, ModelResponder
from vlmix.evals.routing import RoutingReport
from vlmix.evals.run import EvalResult, ask_share, evaluate, versions
from vlmix.evals.served import ServerResponder
from vlmix.evals.store import AnswerStore, StoredResponder, model_digest
from vlmix.models.loading import load, model_folder
from vlmix.train.parallel.processes import Processes, joined

_SEED = 0
_PATIENCE_SECONDS = 7 * 24 * 3600.0  # one process may be that much slower than another


@dataclass(frozen=True, slots=True)
class Judged:
    """What came of it, with sentences for the report and one on how long it took."""

    results: Sequence[EvalResult]
    summary: str
    notes: Sequence[str] = ()
    routing: RoutingReport | None = None


@dataclass(frozen=True, slots=True)
class _Opened:
    """Who answers, and all that the answers follow from besides question and decoding."""

    responder: Responder
    basis: Mapping[str, Json]


@contextmanager
def judge_subject(
    subject: Subject, asked: Sequence[Asked], decoding: Decoding, out: Path, *, routing: bool = False
) -> Generator[Judged | None]:
    """Judge the subject and own ``out`` while the block writes the report there; None on other processes.

    Raises:
        InputError: if the subject cannot be judged so, or ``out`` holds something else than a report.
        RunLockedError: if another process uses ``out``.
        InterruptedRunError: if a signal asked to stop; the answers so far are kept.

    """
    check_report_folder(out)
    with joined(ParallelSettings(kind="ddp", patience_s=_PATIENCE_SECONDS)) as team, ExitStack() as stack:
        with team.together(f"opening {out}"):
            if team.is_main:
                stack.enter_context(run_lock(out))
                recover(out.parent, out.name)
        progress = stack.enter_context(AskingProgress(err()))
        try:
            yield _judged(subject, asked, decoding, out, team, progress, routing)
        except KeyboardInterrupt:
            raise InterruptedRunError(
                f"stopped: the answers so far are kept in {out / UNFINISHED}; the same command goes on"
            ) from None


def _judged(
    subject: Subject,
    asked: Sequence[Asked],
    decoding: Decoding,
    out: Path,
    team: Processes,
    progress: AskingProgress,
    routing: bool,
) -> Judged | None:
    if subject.answers is not None:
        return _judged_file(subject.answers, asked, decoding, progress) if team.is_main else None
    if routing:
        if subject.folder is None or team.world > 1:
            raise InputError("--routing watches the experts of a model folder, in one process")
        results, seen = judge_watched(model_folder(subject.folder), asked, decoding, progress)
        return Judged(results, progress.summary(), routing=seen)
    with team.together("loading the model"):
        opened = _opened(subject, team)
    if team.world > 1:
        with team.together("answering"):
            store = AnswerStore(out / UNFINISHED, team.rank)
            for benchmark, limit in asked:
                ask_share(
                    _stored(opened, store, benchmark, progress),
                    benchmark,
                    decoding,
                    limit=limit,
                    blind=True,
                    seed=_SEED,
                    rank=team.rank,
                    world=team.world,
                    progress=progress.of(benchmark.settings.kind),
                )
    if not team.is_main:
        return None
    store = AnswerStore(out / UNFINISHED, team.rank)
    results = [
        evaluate(
            _stored(opened, store, benchmark, progress, quiet=team.world > 1),
            benchmark,
            decoding,
            limit=limit,
            progress=None if team.world > 1 else progress.of(benchmark.settings.kind),
            seed=_SEED,
        )
        for benchmark, limit in asked
    ]
    return Judged(results, progress.summary())


def _judged_file(path: Path, asked: Sequence[Asked], decoding: Decoding, progress: AskingProgress) -> Judged:
    found = read_answers(path)
    results: list[EvalResult] = []
    notes: list[str] = [f"The answers are those of {path.name}; no model was asked, so there is no control."]
    for benchmark, limit in asked:
        if not benchmark.canned:
            raise InputError(f"{benchmark.settings.kind} asks for more than answers: judge a model folder")
        results.append(evaluate(CannedResponder(found.texts), benchmark, decoding, limit=limit, blind=False))
        notes += found.notes(results[-1].samples)
    return Judged(results, progress.summary(), notes)


def _opened(subject: Subject, team: Processes) -> _Opened:
    if subject.folder is not None:
        folder = model_folder(subject.folder)
        responder = ModelResponder(*load(folder, team.device), seed=_SEED)
        basis = {"model": model_digest(folder), "device": team.device.type, "seed": _SEED}
        return _Opened(responder, {**basis, "versions": dict(versions())})
    settings = ServerSettings(
        url=subject.url, model=subject.model_name, key_variable=subject.key_variable, timeout_seconds=300.0
    )
    return _Opened(ServerResponder(settings), {"server": settings.url, "model": settings.model})


def _stored(
    opened: _Opened,
    store: AnswerStore,
    benchmark: Benchmark,
    progress: AskingProgress,
    *,
    quiet: bool = False,
) -> StoredResponder:
    basis = {**opened.basis, "benchmark": benchmark.settings.model_dump(mode="json")}
    if quiet:
        return StoredResponder(opened.responder, store, basis, lambda *_: None, lambda _: None)
    return StoredResponder(opened.responder, store, basis, progress.there, progress.ready)
