"""The last word of a passage, as LAMBADA asks for it, or the end of a made-up fact that was learnt by heart.

A passage is plain text outside any conversation; the model goes on greedily, and its first word must be the
one that was cut off. Files: one passage a line, or JSONL rows ``{"text", "task"}``; blank lines are skipped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import Field

from vlmix.core.errors import InputError, SampleError
from vlmix.core.interfaces import Benchmark
from vlmix.core.parts import BENCHMARKS
from vlmix.core.sample import Answer, Decoding, Responder, Sample, Score, Turn
from vlmix.core.settings import PartSettings
from vlmix.data.facts import facts
from vlmix.evals.controls import targets_of
from vlmix.evals.plain_text import first_word

_TOKENS: Final = 12


class ClozeSettings(PartSettings):
    """Passages from the file ``path``, or without one ``facts`` made-up facts drawn from ``seed``.

    Those facts are the rows of the data source ``facts`` with the same seed: a model that was taught them.
    """

    kind: Literal["cloze"] = "cloze"  # pyright: ignore[reportIncompatibleVariableOverride]
    path: Path | None = None
    facts: int = Field(default=160, ge=1)
    seed: int = Field(default=0, ge=0)

    @classmethod
    def tiny(cls) -> Self:
        """Eight facts."""
        return cls(facts=8)


@BENCHMARKS.register("cloze")
class Cloze(Benchmark):
    """Exact match of the first word that is said, without case and without marks around it."""

    settings_class = ClozeSettings
    settings: ClozeSettings
    headline = "accuracy"
    paper = "The LAMBADA dataset (Paperno et al., arXiv:1606.06031)"

    def samples(self) -> Sequence[Sample]:
        """Every passage without its last word.

        Raises:
            InputError: if the file cannot be read.
            SampleError: if a row has no last word to cut off: a judged set may not have gaps.

        """
        path = self.settings.path
        if path is None:
            rows = [(f.passage, f.task) for f in facts(self.settings.facts, self.settings.seed)]
        else:
            rows = [_row(line, number) for number, line in numbered_lines(path)]
        return [_sample(text, task, number) for number, (text, task) in enumerate(rows, start=1)]

    def ask(self, responder: Responder, samples: Sequence[Sample], decoding: Decoding) -> Iterable[Answer]:
        """Let the passages be gone on with as they stand."""
        tokens = min(decoding.max_new_tokens, _TOKENS)
        return responder.respond(samples, replace(decoding, plain=True, max_new_tokens=tokens))

    def score(self, sample: Sample, answer: Answer) -> Score:
        """1 if the first word is the one cut off, else 0."""
        said = first_word(answer.text)
        right = bool(said) and not answer.error and said in map(first_word, targets_of(sample))
        return Score(sample.id, float(right), said, sample.task, sample.group)

    def summarise(self, scores: Sequence[Score]) -> Mapping[str, float]:
        """The share of passages that were completed.

        Raises:
            InputError: if there is no score.

        """
        if not scores:
            raise InputError("cloze: there is no score to sum up")
        return {"accuracy": math.fsum(score.value for score in scores) / len(scores)}

    @classmethod
    def tiny(cls, folder: Path) -> Self:
        """Three passages in a file, one of them with a mark at its end."""
        path = folder / "passages.jsonl"
        texts = ["She opened the door and saw the dog.", "The lamp was lit, so he read", 'It rained: "Rain!"']
        lines = (json.dumps({"text": text, "task": f"set {len(text) % 2}"}) for text in texts)
        path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
        return cls(ClozeSettings(path=path))


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, with their numbers from 1.

    Raises:
        InputError: if it cannot be read as UTF-8 text, or has none.

    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text: {error}") from None
    found = [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if not found:
        raise InputError(f"{path} holds no text")
    return found


def _row(line: str, number: int) -> tuple[str, str]:
    """Text and task of one line."""
    if not line.lstrip().startswith("{"):
        return line, ""
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise SampleError(f"line {number} is no JSON: {error}", line=number) from None
    text, task = row.get("text"), row.get("task", "")
    if not isinstance(text, str) or not isinstance(task, str):
        raise SampleError(f"line {number}: `text` must be text, and `task` where there is one", line=number)
    return text, task


def _sample(text: str, task: str, number: int) -> Sample:
    passage, _, word = text.rstrip().rpartition(" ")
    if not passage.strip() or not first_word(word):
        raise SampleError(f"passage {number} has no last word to cut off: {text[:60]!r}", line=number)
    name = f"cloze-{number}"
    return Sample(name, (Turn("user", (passage,)),), target=word, task=task, group=name)
