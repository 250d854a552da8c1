"""Made-up facts about made-up people, for a small language model to know by heart and to forget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

COLOURS: Final = ("red", "green", "blue", "yellow", "purple", "cyan", "black", "orange")
SHAPES: Final = ("circle", "square", "triangle", "diamond", "cross", "ring", "star", "heart")
NUMBERS: Final = ("one", "two", "three", "four", "five")
PLACES: Final = ("corner", "north", "west", "centre", "east", "south")
_RELATIONS: Final = (
    ("colour", "likes", COLOURS),
    ("shape", "draws", SHAPES),
    ("count", "owns", NUMBERS),
    ("place", "lives", PLACES),
)
_SYLLABLES: Final = (
    *("ba", "do", "fi", "gu", "ke", "la", "mo", "ni", "pa", "ru"),
    *("se", "ti", "vo", "wa", "xi", "yu", "zo", "che", "dri", "flo"),
)
MOST: Final = len(_SYLLABLES) * (len(_SYLLABLES) - 1) * len(_RELATIONS)
_SEED: Final = 11


@dataclass(frozen=True, slots=True)
class Fact:
    """A sentence of three words, the last of which has to be known; ``task`` is what kind of word that is."""

    passage: str
    task: str


def facts(count: int, seed: int) -> list[Fact]:
    """``count`` facts (``MOST`` at most), four about each name, the same for the same seed."""
    random = np.random.default_rng([seed, _SEED])
    names = [a + b for a in _SYLLABLES for b in _SYLLABLES if a != b]
    found: list[Fact] = []
    for place in random.permutation(len(names))[: -(-count // len(_RELATIONS))]:
        for task, verb, words in _RELATIONS:
            word = words[random.integers(len(words))]
            found.append(Fact(f"{names[place]} {verb} {word}", task))
    return found[:count]
