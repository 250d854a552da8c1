"""The model under examination, with what several diagnostics ask of it: each is worked out once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from typing import TYPE_CHECKING, Any, cast

from vlmix.core.errors import InputError
from vlmix.core.interfaces import Benchmark
from vlmix.core.sample import Decoding, Sample, Score
from vlmix.evals.diagnostics._looks import Looks, Seen, look_at
from vlmix.evals.diagnostics._standing_in import masked
from vlmix.evals.responder import ModelResponder
from vlmix.evals.run import EvalResult, Progress, evaluate

if TYPE_CHECKING:
    from vlmix.models.modeling import VlmixForConditionalGeneration
    from vlmix.models.processing import VlmixProcessor

MOST_SUBSETS_OF = 5
"""With more encoders there are too many subsets to ask them all."""
Lost = frozenset[int]
"""Encoders that are masked, counted from 0."""


@dataclass(frozen=True)
class Questions:
    """What every model is asked: the first ``limit`` questions of a benchmark, always in the same way."""

    benchmark: Benchmark
    limit: int | None = None
    decoding: Decoding = field(default_factory=Decoding)
    seed: int = 0
    tell: Progress | None = None

    @cached_property
    def samples(self) -> tuple[Sample, ...]:
        """The questions themselves."""
        return tuple(self.benchmark.samples()[: self.limit])

    @cached_property
    def kept(self) -> Benchmark:
        """The benchmark with these questions, which are read or painted once and not for every choice."""
        return cast("Benchmark", _Kept(self.benchmark, self.samples))


class _Kept:
    """Stands for a benchmark whose questions are at hand."""

    def __init__(self, benchmark: Benchmark, samples: Sequence[Sample]) -> None:
        self._benchmark, self._samples = benchmark, samples

    def samples(self) -> Sequence[Sample]:
        return self._samples

    def __getattr__(self, name: str) -> Any:
        return getattr(self._benchmark, name)


class Answering:
    """A model that answers the same questions without some of its encoders; each choice is asked once."""

    def __init__(
        self,
        name: str,
        model: VlmixForConditionalGeneration,
        processor: VlmixProcessor,
        questions: Questions,
    ) -> None:
        self.name, self.model, self.processor, self.questions = name, model.eval(), processor, questions
        self._results: dict[Lost, EvalResult] = {}

    @property
    def encoders(self) -> list[str]:
        """Every encoder's number and kind."""
        return [f"{i} {part.kind}" for i, part in enumerate(self.model.config.encoder_settings())]

    def result(self, lost: Lost = Lost()) -> EvalResult:  # noqa: B008 - an empty frozenset cannot change
        """The benchmark's result without these encoders; the blind control is not asked."""
        if lost not in self._results:
            asked = self.questions
            with masked(self.model.model, lost):
                self._results[lost] = evaluate(
                    ModelResponder(self.model, self.processor),
                    asked.kept,
                    asked.decoding,
                    progress=self._progress(lost),
                    blind=False,
                    seed=asked.seed,
                )
        return self._results[lost]

    def scores(self, lost: Lost = Lost()) -> list[Score]:  # noqa: B008 - an empty frozenset cannot change
        """Every question's score that counts in means."""
        return [score for score in self.result(lost).model.scores if score.counted]

    def subsets(self) -> Iterator[tuple[tuple[int, ...], Lost]]:
        """All choices of encoders to keep, fewest first, each with those that are lost."""
        numbers = range(len(self.encoders))
        for count in range(len(numbers) + 1):
            for kept in combinations(numbers, count):
                yield kept, Lost(numbers) - Lost(kept)

    def _progress(self, lost: Lost) -> Progress | None:
        tell = self.questions.tell
        if tell is None:
            return None
        names = ", ".join(self.encoders[number] for number in sorted(lost))
        what = f"{self.name} without {names}" if lost else self.name

        def told(_: str, done: int, total: int) -> None:
            tell(what, done, total)

        return told


@dataclass
class Subject:
    """A model and its questions. ``subsets``: ask every choice of encoders.

    ``against`` are other models for the same choices, opened one at a time, by name.
    """

    answering: Answering
    subsets: bool = False
    against: Mapping[str, Callable[[], Answering]] = field(default_factory=dict[str, Callable[[], Answering]])

    def __post_init__(self) -> None:
        count = len(self.encoders)
        if self.subsets and count > MOST_SUBSETS_OF:
            raise InputError(
                f"--subsets: {count} encoders have {2**count} subsets; at most {MOST_SUBSETS_OF} encoders "
                "are asked so. Leave --subsets out: leaving out one encoder at a time is always asked"
            )
        if self.against and not self.subsets:
            raise InputError("--against compares curves over all subsets of encoders: give --subsets as well")

    @property
    def model(self) -> VlmixForConditionalGeneration:
        """The model."""
        return self.answering.model

    @property
    def encoders(self) -> list[str]:
        """Every encoder's number and kind."""
        return self.answering.encoders

    @property
    def samples(self) -> Sequence[Sample]:
        """The questions."""
        return self.answering.questions.samples

    @property
    def seed(self) -> int:
        """What is drawn is drawn from this."""
        return self.answering.questions.seed

    @cached_property
    def looks(self) -> Looks:
        """Tokens of every encoder's map, drawn from distinct pictures."""
        return Looks.gathered(self.model, self.answering.processor, self.samples, self.seed)

    def seen(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, Seen]]:
        """What the vision parts do with each question's pictures; what cannot be opened is left out."""
        for sample in samples:
            found = look_at(self.model, self.answering.processor, sample)
            if found is not None:
                yield sample, found
