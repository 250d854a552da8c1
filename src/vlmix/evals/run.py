"""Judge a responder on a benchmark: figures with intervals, beside what needs no understanding.

The responder sees questions only, never targets. The same questions are asked a second time with the
pictures exchanged (the blind control): what is still right then did not come from looking.
"""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from vlmix.core.errors import InputError, VlmixError
from vlmix.core.interfaces import Benchmark
from vlmix.core.sample import Answer, Decoding, Json, Responder, Sample, Score
from vlmix.evals.controls import blinded, majority_answer, majority_by_task, question_of
from vlmix.evals.jackknife import figure_intervals
from vlmix.evals.statistics import Interval, mean_interval

Progress = Callable[[str, int, int], None]
"""Called as (what is being asked, questions done, questions in all)."""

_PACKAGES = ("vlmix", "torch", "torchvision", "transformers", "tokenizers", "timm", "numpy", "pillow")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One set of answers, judged: the benchmark's figures, the mean score of each task, and the intervals.

    ``failed`` counts answers that are errors; they score 0 and are part of every figure. Of a control only
    the headline has an interval. ``replicates`` are those of figures that are no means, in the ``blocks`` of
    ``FigureIntervals``.
    """

    answers: tuple[Answer, ...]
    scores: tuple[Score, ...]
    figures: Mapping[str, float]
    intervals: Mapping[str, Interval]
    tasks: Mapping[str, Interval]
    failed: int
    seconds: float = 0.0
    replicates: Mapping[str, tuple[float, ...]] = field(default_factory=dict[str, tuple[float, ...]])
    blocks: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """A responder on a benchmark, and the controls on the same questions.

    ``units`` are of figures that are no share of 1. ``protocol`` is the scoring rule, where a benchmark has
    several, and ``source`` where it stands; ``note`` is what a reader of the figures has to know.
    ``majority`` gives the most frequent target of all to every question, ``majority_by_task`` that of its
    task; ``blind`` is the responder itself with exchanged pictures, None if it was not asked again.
    """

    benchmark: str
    paper: str
    settings: Mapping[str, Json]
    headline: str
    samples: tuple[Sample, ...]
    model: Outcome
    majority: Outcome
    majority_by_task: Outcome
    blind: Outcome | None
    decoding: Decoding
    seed: int
    versions: Mapping[str, str]
    units: Mapping[str, str] = field(default_factory=dict[str, str])
    protocol: str = ""
    source: str = ""
    note: str = ""


def evaluate(
    responder: Responder,
    benchmark: Benchmark,
    decoding: Decoding | None = None,
    *,
    limit: int | None = None,
    progress: Progress | None = None,
    blind: bool = True,
    seed: int = 0,
) -> EvalResult:
    """Ask every question (the first ``limit``), judge the answers, and judge the controls.

    ``seed`` exchanges the pictures of the blind control and draws the resamples of the intervals.

    Raises:
        InputError: if there is no question.
        VlmixError: if the responder leaves out an answer or gives it to another question.

    """
    decoding, tell = decoding or Decoding(), progress or _silent
    samples = _first(benchmark, limit)
    asked = _Asked(responder, benchmark, decoding, tell, seed)
    model = asked.outcome("questions", samples)
    constant, by_task = majority_answer(samples), majority_by_task(samples)
    shuffled = _control(samples, seed) if blind else []
    return EvalResult(
        benchmark=benchmark.settings.kind,
        paper=benchmark.paper,
        settings=benchmark.settings.model_dump(mode="json"),
        headline=benchmark.headline,
        samples=samples,
        model=model,
        majority=_judge(benchmark, samples, [Answer(s.id, constant) for s in samples], seed, control=True),
        majority_by_task=_judge(
            benchmark, samples, [Answer(s.id, by_task[s.task]) for s in samples], seed, control=True
        ),
        blind=asked.outcome("blind control", shuffled, control=True) if shuffled else None,
        decoding=decoding,
        seed=seed,
        versions=versions(),
        units={name: unit for name in model.figures if (unit := benchmark.unit(name))},
        protocol=benchmark.protocol,
        source=benchmark.source,
        note=benchmark.note,
    )


def ask_share(  # noqa: PLR0913  (as `evaluate`, and which share)
    responder: Responder,
    benchmark: Benchmark,
    decoding: Decoding,
    *,
    limit: int | None,
    blind: bool,
    seed: int,
    rank: int,
    world: int,
    progress: Progress | None = None,
) -> None:
    """Ask what falls to process ``rank`` of ``world``: every ``world``-th question, controls included.

    The answers are the responder's to keep; nothing is judged. Benchmarks that ask for more than answers are
    left to the process that judges.

    Raises:
        InputError: if there is no question.

    """
    if not benchmark.canned:
        return
    samples = _first(benchmark, limit)
    asked = [*samples, *(_control(samples, seed) if blind else [])]
    share = [question_of(sample) for sample in asked if not sample.defect][rank::world]
    tell = progress or _silent
    tell("questions", 0, len(share))
    for done, _ in enumerate(benchmark.ask(responder, share, decoding), 1):
        tell("questions", done, len(share))


def _first(benchmark: Benchmark, limit: int | None) -> tuple[Sample, ...]:
    """The first ``limit`` questions, or all.

    Raises:
        InputError: if there is none.

    """
    samples = tuple(benchmark.samples()[:limit])
    if not samples:
        raise InputError(
            f"{benchmark.settings.kind}: there is no question to ask; raise its size or the limit"
        )
    return samples


def _control(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """The questions of the blind control; none where nothing is shown."""
    return blinded(samples, seed) if any(sample.images for sample in samples) else []


def versions() -> Mapping[str, str]:
    """The versions that can change an answer, by package."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **found}


@dataclass(frozen=True, slots=True)
class _Asked:
    """What stays the same when the questions are asked a second time."""

    responder: Responder
    benchmark: Benchmark
    decoding: Decoding
    tell: Progress
    seed: int

    def outcome(self, what: str, samples: Sequence[Sample], *, control: bool = False) -> Outcome:
        started = time.perf_counter()
        broken = {
            sample.id: Answer(sample.id, "", error=sample.defect) for sample in samples if sample.defect
        }
        questions = [question_of(sample) for sample in samples if not sample.defect]
        answers: list[Answer] = []
        self.tell(what, 0, len(questions))
        stream = iter(self.benchmark.ask(self.responder, questions, self.decoding))
        for question, answer in zip_longest(questions, stream):
            if answer is None or question is None or answer.sample_id != question.id:
                asked = question.id if question else "nothing more"
                given = f"an answer to {answer.sample_id!r}" if answer else "no answer"
                raise VlmixError(
                    f"asked {asked!r}, the responder gave {given}: it owes one answer each, in order"
                )
            answers.append(answer)
            self.tell(what, len(answers), len(questions))
        given = {**broken, **{answer.sample_id: answer for answer in answers}}
        whole = [given[sample.id] for sample in samples]
        seconds = time.perf_counter() - started
        return _judge(self.benchmark, samples, whole, self.seed, seconds, control=control)


def _judge(
    benchmark: Benchmark,
    samples: Sequence[Sample],
    answers: Sequence[Answer],
    seed: int,
    seconds: float = 0.0,
    *,
    control: bool = False,
) -> Outcome:
    scores = benchmark.judge(samples, answers)
    figures = dict(benchmark.summarise(scores))
    counted = [score for score in scores if score.counted]
    tasks = sorted({score.task for score in counted})
    sure = figure_intervals(
        benchmark.summarise,
        scores,
        seed=seed,
        units={name: benchmark.unit(name) for name in figures},
        only=[benchmark.headline] if control else None,
    )
    return Outcome(
        answers=tuple(answers),
        scores=tuple(scores),
        figures=figures,
        intervals=sure.intervals,
        tasks={task: mean_interval([s for s in counted if s.task == task], seed=seed) for task in tasks},
        failed=sum(bool(answer.error) for answer in answers),
        seconds=seconds,
        replicates=sure.replicates,
        blocks=sure.blocks,
    )


def _silent(_: str, __: int, ___: int) -> None:
    """Tell nobody."""
