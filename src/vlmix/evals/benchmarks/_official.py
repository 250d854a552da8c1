"""What benchmarks with an official rule share: published files become questions, the rule scores the answers.

One of them says where its files are, how a line of them becomes a question, and which figure stands for all.
A line that cannot be used stays a question: it is not asked, is listed with its reason, and counts as wrong.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Final, Self

from pydantic import model_validator

from vlmix.core.errors import InputError, SampleError, suggestion
from vlmix.core.interfaces import Benchmark
from vlmix.core.parts import SCORERS
from vlmix.core.sample import Answer, ImageRef, Json, Judged, Row, Sample, Score, Turn
from vlmix.core.scoring import Scorer, flat, unit_of
from vlmix.core.settings import PartSettings

MALFORMED: Final = "malformed"
"""What stands in for the fields of a line that cannot be read, and its task."""


class OfficialSettings(PartSettings):
    """Where the published files lie, and by which protocol answers are scored: the official one if empty.

    ``rule`` is the name of the scoring rule.
    """

    rule: ClassVar[str]
    path: Path
    protocol: str = ""

    @model_validator(mode="after")
    def _has_a_rule(self) -> Self:
        known = SCORERS.get(self.rule).protocols
        if self.protocol and self.protocol not in known:
            raise ValueError(
                f"no protocol {self.protocol!r}.{suggestion(self.protocol, known)} Known: {', '.join(known)}"
            )
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question as it will be asked and scored.

    ``text`` is the whole prompt, pictures before it. ``gold`` is what the rule compares with, ``fields`` are
    those it needs. ``targets`` are answers that are right altogether, the preferred one first: majority
    controls and readers of a report use them. ``options`` are what a model may answer, as the prompt asks
    for it: the letters, where it asks for a letter.
    """

    id: str
    text: str
    images: Sequence[ImageRef]
    gold: Json
    targets: Sequence[str]
    fields: Mapping[str, Json] = field(default_factory=dict[str, Json])
    options: Sequence[str] = ()
    task: str = ""
    group: str = ""
    language: str = "en"


class OfficialBenchmark(Benchmark):
    """A benchmark scored by the rule of ``vlmix score``.

    Implement ``lines`` and ``question``; ``headlines`` has the figure that stands for all, by protocol.
    """

    settings_class: ClassVar[type[OfficialSettings]]  # pyright: ignore[reportIncompatibleVariableOverride]
    settings: Any
    headlines: ClassVar[Mapping[str, str]]

    def __init__(self, settings: OfficialSettings) -> None:
        super().__init__(settings)
        self.rule: Scorer = self.scorer()
        self.protocol = settings.protocol or self.usual_protocol()
        self.source = self.rule.protocols[self.protocol].source
        self.headline = self.headlines[self.protocol]

    def scorer(self) -> Scorer:
        """The rule, ready to score."""
        return SCORERS.get(self.settings.rule)()

    def usual_protocol(self) -> str:
        """The protocol where the settings name none."""
        return self.rule.official()

    @abstractmethod
    def lines(self) -> Iterator[tuple[str, object]]:
        """Where each line stands, such as ``file.json:3``, and what it holds, or the error it gave.

        Raises:
            InputError: if a file is not where it should be: the message says which and how it is had.

        """

    @abstractmethod
    def question(self, raw: object) -> Question:
        """One line as a question.

        Raises:
            SampleError: with the reason, if it cannot be used.

        """

    def unread(self, place: str) -> Mapping[str, Json]:
        """The rule's fields of a line that could not be used, such that it counts where it belongs."""
        del place
        return dict.fromkeys(self.rule.fields, MALFORMED)

    def counts(self, sample: Sample) -> bool:
        """Whether a question counts for itself, or is asked only to judge others by."""
        del sample
        return True

    def samples(self) -> Sequence[Sample]:
        """Every line as a question, in the order of the file.

        Raises:
            InputError: if the files are not there.

        """
        return list(self._questions.values())

    def score(self, sample: Sample, answer: Answer) -> Score:
        """Judge one answer as if it were alone."""
        return self.judge([sample], [answer])[0]

    def judge(self, samples: Sequence[Sample], answers: Sequence[Answer]) -> list[Score]:
        """Judge all answers by the protocol; a question that could not be asked is wrong."""
        rows = [_row(sample, answer) for sample, answer in zip(samples, answers, strict=True)]
        sound = [(sample, row) for sample, row in zip(samples, rows, strict=True) if not sample.defect]
        found = self.rule.judge([row for _, row in sound], self.protocol)
        judged = {sample.id: each for (sample, _), each in zip(sound, found, strict=True)}
        full = self.rule.protocols[self.protocol].full
        return [
            self._scored(sample, answer, row, judged.get(sample.id), full)
            for sample, answer, row in zip(samples, answers, rows, strict=True)
        ]

    def summarise(self, scores: Sequence[Score]) -> Mapping[str, float]:
        """The official aggregates; names of groups are joined by dots."""
        pairs = [(each.row, each.judged) for each in scores if each.row and each.judged]
        summary = self.rule.summarise(
            [row for row, _ in pairs], [judged for _, judged in pairs], self.protocol
        )
        return dict(flat(summary))

    def unit(self, figure: str) -> str:
        """The unit of a figure, that of the nearest group around it."""
        return unit_of(figure, self.rule.units)

    @cached_property
    def _questions(self) -> Mapping[str, Sample]:
        found: dict[str, Sample] = {}
        for place, raw in self.lines():
            sample = self._sample(place, raw)
            if sample.id in found:
                sample = self._malformed(place, f"the id {sample.id!r} appears before")
            found[sample.id] = sample
        if not found:
            raise InputError(f"{self.settings.path}: there is no question in these files")
        return found

    def _sample(self, place: str, raw: object) -> Sample:
        try:
            if isinstance(raw, SampleError):
                raise raw
            asked = self.question(raw)
        except SampleError as error:
            return self._malformed(place, error.reason)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            return self._malformed(place, f"a field is missing or of another kind ({error!r})")
        return Sample(
            id=asked.id,
            turns=(Turn("user", (*asked.images, asked.text)),),
            target=tuple(asked.targets),
            task=asked.task,
            group=asked.group,
            language=asked.language,
            meta={"gold": asked.gold, **asked.fields},
            options=tuple(asked.options),
        )

    def _malformed(self, place: str, reason: str) -> Sample:
        return Sample(
            id=place,
            turns=(Turn("user", (f"({MALFORMED})",)),),
            task=MALFORMED,
            meta={"gold": MALFORMED, **self.unread(place)},
            defect=f"{place}: {reason}",
        )

    def _scored(self, sample: Sample, answer: Answer, row: Row, judged: Judged | None, full: float) -> Score:
        if answer.error or judged is None:
            judged = self.rule.failed(row, judged or Judged(None), self.protocol)
        value = min(1.0, max(0.0, (judged.value or 0.0) / full))
        return Score(
            sample.id,
            value,
            judged.parsed,
            sample.task,
            sample.group,
            state=judged.state,
            row=row,
            judged=judged,
            counted=self.counts(sample),
        )


def _row(sample: Sample, answer: Answer) -> Row:
    """What the rule sees: a question that could not be asked has no answer."""
    fields = {name: value for name, value in sample.meta.items() if name != "gold"}
    return Row(sample.id, sample.meta["gold"], None if answer.error else answer.text, fields)
