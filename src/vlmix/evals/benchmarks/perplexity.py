"""How well a language model predicts plain text: bits per byte, which tokenizers cannot flatter.

The text is cut at blanks into pieces of about ``piece`` bytes, whatever the tokenizer; each is judged behind
the ``context`` bytes before it, outside any chat template.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

from pydantic import Field

from vlmix.core.errors import InputError
from vlmix.core.interfaces import Benchmark
from vlmix.core.parts import BENCHMARKS
from vlmix.core.sample import Answer, Decoding, Responder, Sample, Score, Turn
from vlmix.core.settings import PartSettings
from vlmix.data.facts import facts
from vlmix.evals.plain_text import telling

_NOTHING_KNOWN = 8.0  # bits of a byte for who has no idea: what a failed piece costs


class PerplexitySettings(PartSettings):
    """A text file, or every ``*.txt`` of a folder, each a text of its own; without ``path`` made-up facts."""

    kind: Literal["perplexity"] = "perplexity"  # pyright: ignore[reportIncompatibleVariableOverride]
    path: Path | None = None
    piece: int = Field(default=512, ge=1)
    context: int = Field(default=1024, ge=0)
    facts: int = Field(default=160, ge=1)
    seed: int = Field(default=0, ge=0)

    @classmethod
    def tiny(cls) -> Self:
        """Small pieces of a few facts."""
        return cls(piece=40, context=30, facts=16)


@BENCHMARKS.register("perplexity")
class Perplexity(Benchmark):
    """``byte_probability`` is 2 to the minus ``bits_per_byte``: a share of 1, which forgetting lowers."""

    settings_class = PerplexitySettings
    settings: PerplexitySettings
    headline = "byte_probability"
    units = {"bits_per_byte": "bits/byte", "nats_per_token": "nats/token"}  # noqa: RUF012  (never changed)
    canned = False

    def samples(self) -> Sequence[Sample]:
        """Every piece of every text, with what stands before it as the question.

        Raises:
            InputError: if there is no text to read.

        """
        found: list[Sample] = []
        for name, text in self._texts:
            start = 0
            for number, end in enumerate(_cuts(text, self.settings.piece)):
                before = _last_bytes(text[:start], self.settings.context)
                turn = Turn("user", (before,))
                found.append(Sample(f"{name}-{number}", (turn,), text[start:end], task=name, group=name))
                start = end
        # Pieces of one text lean on one another; where there is only one, they have to stand for themselves.
        return found if len(self._texts) > 1 else [_alone(sample) for sample in found]

    def ask(self, responder: Responder, samples: Sequence[Sample], decoding: Decoding) -> Iterable[Answer]:
        """How unlikely each piece is behind what stands before it.

        Raises:
            InputError: if the responder cannot tell.

        """
        pieces = {sample.id: str(sample.target) for sample in self.samples()}
        pairs = [(sample.turns[-1].text, pieces[sample.id]) for sample in samples]
        told = telling(responder).likelihoods(pairs)
        for sample, found in zip(samples, told, strict=True):
            yield Answer(sample.id, "", found.tokens, nats=found.nats)

    def score(self, sample: Sample, answer: Answer) -> Score:
        """The piece's own probability per byte, with its bits, bytes and tokens."""
        size = len(str(sample.target).encode())
        known = answer.nats is not None and not answer.error
        bits = (answer.nats or 0.0) / math.log(2) if known else _NOTHING_KNOWN * size
        counts = {"bits": bits, "bytes": size, "tokens": answer.tokens if known else size}
        return Score(sample.id, 2 ** (-bits / size), "", sample.task, sample.group, counts)

    def summarise(self, scores: Sequence[Score]) -> Mapping[str, float]:
        """Bits of all pieces over their bytes, and nats over tokens.

        Raises:
            InputError: if there is no score.

        """
        if not scores:
            raise InputError("perplexity: there is no score to sum up")
        sums = {key: math.fsum(s.counts[key] for s in scores) for key in ("bits", "bytes", "tokens")}
        per_byte = sums["bits"] / sums["bytes"]
        nats = sums["bits"] * math.log(2) / sums["tokens"]
        return {"byte_probability": 2**-per_byte, "bits_per_byte": per_byte, "nats_per_token": nats}

    @classmethod
    def tiny(cls, folder: Path) -> Self:
        """Small pieces of a few facts; no file is needed."""
        del folder
        return cls(PerplexitySettings.tiny())

    @cached_property
    def _texts(self) -> list[tuple[str, str]]:
        path, settings = self.settings.path, self.settings
        if path is None:
            known = facts(settings.facts, settings.seed)
            return [("facts", "\n".join(f"{fact.passage}." for fact in known))]
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        texts = [(file.stem, _read(file)) for file in files]
        texts = [(name, text) for name, text in texts if text]
        if not texts:
            raise InputError(f"{path} holds no text: give a text file, or a folder with *.txt files")
        return texts


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: {error}") from None


def _cuts(text: str, size: int) -> Iterator[int]:
    """Where pieces end: before the first blank after ``size`` bytes, and at the end."""
    inside = 0
    for place, character in enumerate(text):
        if inside >= size and character.isspace() and not text[place - 1].isspace():
            yield place
            inside = 0
        inside += len(character.encode())
    yield len(text)


def _last_bytes(text: str, size: int) -> str:
    """The whole words among the last ``size`` bytes."""
    if len(text.encode()) <= size:
        return text
    cut = text.encode()[-size:].decode(errors="ignore") if size else ""
    _, blank, rest = cut.partition(" ")
    return rest if blank else ""


def _alone(sample: Sample) -> Sample:
    return Sample(sample.id, sample.turns, sample.target, sample.task, sample.id)
