"""NLVR (Suhr et al. 2017): is a human sentence true of three boxes? Accuracy, and whole sentences right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from vlmix.core.interfaces import Benchmark
from vlmix.core.parts import BENCHMARKS
from vlmix.core.sample import Answer, Row, Sample, Score
from vlmix.core.settings import PartSettings
from vlmix.data.boxes.published import ORDERS
from vlmix.data.sources.nlvr import Nlvr, NlvrSettings
from vlmix.evals.scoring._truth import judged_truth, right_and_consistent


class NlvrBenchmarkSettings(PartSettings):
    """Which split is judged and how it is asked; the keys mean what they mean for the source ``nlvr``."""

    kind: Literal["nlvr"] = "nlvr"  # pyright: ignore[reportIncompatibleVariableOverride]
    path: Path
    split: str = Field(default="hidden", pattern=r"^[a-z0-9]+$")
    permutations: int = Field(default=ORDERS, ge=1, le=ORDERS)
    boxes: bool = True
    question: str = "{sentence}"

    @model_validator(mode="after")
    def _can_be_asked(self) -> Self:
        self.source()
        return self

    def source(self) -> NlvrSettings:
        """The settings of the data source that reads the questions."""
        return NlvrSettings(**self.model_dump())


@BENCHMARKS.register("nlvr")
class NlvrBenchmark(Benchmark):
    """The official measures over the pictures: precision of all predictions, and whole sentences right.

    An answer is right if it is the label in any case; line ends and blanks behind it do not count, blanks
    before it do, and ``yes`` is wrong: the rule is that of ``vlmix score nlvr``.
    """

    settings_class = NlvrBenchmarkSettings
    settings: NlvrBenchmarkSettings
    headline = "accuracy"
    paper = "A Corpus of Natural Language for Visual Reasoning (Suhr et al., ACL 2017)"

    def samples(self) -> Sequence[Sample]:
        """Every record in each order of its boxes.

        Raises:
            InputError: if the split is not where the settings say.
            SampleError: if a record or picture cannot be used: a judged set may not have gaps.

        """
        return list(Nlvr(self.settings.source()))

    def score(self, sample: Sample, answer: Answer) -> Score:
        """1 if the answer is the label, else 0."""
        judged = judged_truth(Row(sample.id, sample.target, None if answer.error else answer.text))
        return Score(
            sample.id,
            judged.value or 0.0,
            judged.parsed,
            sample.task,
            sample.group,
            state="failed" if answer.error else judged.state,
        )

    def summarise(self, scores: Sequence[Score]) -> Mapping[str, float]:
        """``accuracy`` over all answers; ``consistency``: the share of sentences without a wrong answer."""
        sentences, values = [score.group for score in scores], [score.value for score in scores]
        accuracy, consistency = right_and_consistent(sentences, values)
        return {"accuracy": accuracy, "consistency": consistency}

    @classmethod
    def tiny(cls, folder: Path) -> Self:
        """Two sentences about two scenes each."""
        settings = Nlvr.tiny(folder)
        return cls(NlvrBenchmarkSettings(path=settings.path, split=settings.split))
