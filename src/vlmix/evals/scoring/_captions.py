"""BLEU, ROUGE-L and CIDEr as COCO's caption evaluation computes them, for each picture and for all."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

Words = tuple[str, ...]
Grams = Counter[Words]

_LONGEST: Final = 4
_SIGMA: Final = 6.0
_BETA: Final = 1.2
_TINY: Final = 1e-15
_SMALL: Final = 1e-9
BLEU: Final = tuple(f"Bleu_{n}" for n in range(1, _LONGEST + 1))


@dataclass(frozen=True)
class Captioned:
    """One picture: the tokens of its captions and of the answer, joined by blanks."""

    answer: str
    references: Sequence[str]

    @cached_property
    def overlap(self) -> _Overlap:
        """What BLEU is made of; counted once, though sets that the picture belongs to are many."""
        return _Overlap.of(self)


def grams(text: str) -> Grams:
    """Runs of one to four words, and how often each stands in ``text``."""
    words = text.split()
    return Counter(
        tuple(words[at : at + n]) for n in range(1, _LONGEST + 1) for at in range(len(words) - n + 1)
    )


@dataclass(slots=True)
class _Overlap:
    """What BLEU is made of: lengths, and runs of each length that were given and found."""

    length: int
    reference: int
    given: list[int]
    found: list[int]

    @classmethod
    def of(cls, picture: Captioned) -> _Overlap:
        """Of one picture; the reference nearest in length counts, the shorter of two equally near."""
        length = len(picture.answer.split())
        lengths = [len(reference.split()) for reference in picture.references]
        most: Grams = Counter()
        for reference in picture.references:
            most |= grams(reference)
        found = [0] * _LONGEST
        for gram, count in grams(picture.answer).items():
            found[len(gram) - 1] += min(most[gram], count)
        nearest = min(lengths, key=lambda other: (abs(other - length), other))
        return cls(length, nearest, [max(0, length - n) for n in range(_LONGEST)], found)

    def scores(self) -> dict[str, float]:
        """Bleu_1 to Bleu_4, with the constants that keep COCO's from dividing by 0."""
        ratio = (self.length + _TINY) / (self.reference + _SMALL)
        brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
        product, scores = 1.0, dict[str, float]()
        for n, name in enumerate(BLEU):
            product *= (self.found[n] + _TINY) / (self.given[n] + _SMALL)
            scores[name] = product ** (1 / (n + 1)) * brevity
        return scores


def bleu_of_all(pictures: Sequence[Captioned]) -> Mapping[str, float]:
    """BLEU of a set: lengths and runs are added up before anything is divided."""
    overlaps = [picture.overlap for picture in pictures]
    return _Overlap(
        sum(overlap.length for overlap in overlaps),
        sum(overlap.reference for overlap in overlaps),
        [sum(overlap.given[n] for overlap in overlaps) for n in range(_LONGEST)],
        [sum(overlap.found[n] for overlap in overlaps) for n in range(_LONGEST)],
    ).scores()


def bleu(pictures: Sequence[Captioned]) -> tuple[list[Mapping[str, float]], Mapping[str, float]]:
    """BLEU (Papineni et al. 2002) of each picture, and of all, which is no mean of those."""
    overlaps = [picture.overlap for picture in pictures]
    return [overlap.scores() for overlap in overlaps], bleu_of_all(pictures)


def rouge_l(picture: Captioned) -> float:
    """ROUGE-L (Lin 2004): best precision and best recall, be they of different captions.

    Texts are split at blanks alone, so that nothing is one empty word: nothing for nothing scores 1.
    """
    said = picture.answer.split(" ")
    pairs = [(_common(said, other), len(other)) for other in (text.split(" ") for text in picture.references)]
    precision = max(common / len(said) for common, _ in pairs)
    recall = max(common / length for common, length in pairs)
    if not precision or not recall:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for left in one:
        diagonal = 0
        for j, right in enumerate(other, 1):
            diagonal, row[j] = row[j], diagonal + 1 if left == right else max(row[j], row[j - 1])
    return row[-1]


@dataclass(frozen=True, slots=True)
class _Vector:
    """Weights of a caption's runs of words, by their length, with norms."""

    weights: Sequence[Mapping[Words, float]]
    norms: Sequence[float]
    length: int


def cider(pictures: Sequence[Captioned]) -> list[float]:
    """CIDEr-D (Vedantam et al. 2015) of each picture, 0 to 10; all pictures say which words are rare.

    A picture's score depends on the whole set: a part of a set gives other scores.
    """
    references = [[grams(text) for text in picture.references] for picture in pictures]
    seen: Counter[Words] = Counter()
    for some in references:
        seen.update({gram for reference in some for gram in reference})
    rarest = math.log(len(pictures)) if pictures else 0.0

    def vector(counts: Grams) -> _Vector:
        weights: list[dict[Words, float]] = [{} for _ in range(_LONGEST)]
        for gram, count in counts.items():
            weights[len(gram) - 1][gram] = count * (rarest - math.log(max(1, seen[gram])))
        norms = [math.sqrt(sum(weight**2 for weight in some.values())) for some in weights]
        return _Vector(weights, norms, sum(count for gram, count in counts.items() if len(gram) == 2))

    scores: list[float] = []
    for picture, some in zip(pictures, references, strict=True):
        said = vector(grams(picture.answer))
        total = sum(_alike(said, vector(reference)) for reference in some)
        scores.append(10 * total / _LONGEST / len(some))
    return scores


def _alike(said: _Vector, reference: _Vector) -> float:
    """Clipped cosines over the four lengths of run, less for captions of unlike length."""
    total = 0.0
    for n in range(_LONGEST):
        theirs = reference.weights[n]
        common = sum(
            min(weight, theirs[gram]) * theirs[gram]
            for gram, weight in said.weights[n].items()
            if gram in theirs
        )
        scale = said.norms[n] * reference.norms[n]
        total += common / scale if scale else common
    return total * math.exp(-((said.length - reference.length) ** 2) / (2 * _SIGMA**2))
