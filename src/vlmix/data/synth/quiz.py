"""Several questions about one scene in one conversation: its picture is seen once for all of them."""

from __future__ import annotations

from collections import Counter
from typing import Final

from numpy.random import Generator

from vlmix.data.synth.drawing import Dial, Item
from vlmix.data.synth.scenes import THINGS, Thing, how_many, paint

_QUESTIONS: Final = 5


def quiz(rng: Generator, dial: Dial) -> Item:
    """Colours, shapes, counts and existence in a scene of a few things, in random order."""
    different = dial.between(2, 4) + int(rng.integers(2))
    kinds = [THINGS[i] for i in rng.choice(len(THINGS), different, replace=False)]
    things = [*kinds, *[kinds[0]] * int(rng.integers(3))]
    drawn = dict(_question(rng, things) for _ in range(2 * _QUESTIONS))  # the same question is asked once
    (question, answer), *more = list(drawn.items())[:_QUESTIONS]
    return Item(paint(rng, dial, things), question, answer, {"things": len(things)}, tuple(more))


def _question(rng: Generator, things: list[Thing]) -> tuple[str, str]:
    """A question with its answer; one that this scene does not allow becomes one of existence."""
    counts, kind = Counter(things), ("colour", "shape", "count", "existence")[rng.integers(4)]
    if kind == "count":
        thing = list(counts)[rng.integers(len(counts))]
        return how_many(thing), str(counts[thing])
    shapes, colours = Counter(t.shape for t in things), Counter(t.colour for t in things)
    if kind == "colour" and (alone := [t for t in things if shapes[t.shape] == 1]):
        thing = alone[rng.integers(len(alone))]
        return f"What colour is the {thing.shape}?", thing.colour
    if kind == "shape" and (alone := [t for t in things if colours[t.colour] == 1]):
        thing = alone[rng.integers(len(alone))]
        return f"What shape is {thing.colour}?", thing.shape
    return _existence(rng, things)


def _existence(rng: Generator, things: list[Thing]) -> tuple[str, str]:
    """Yes and no equally often; half of what is not there shares a colour or shape with what is."""
    if rng.integers(2):
        return f"Is there a {things[rng.integers(len(things))]}?", "yes"
    here = things[rng.integers(len(things))]
    absent = [thing for thing in THINGS if thing not in things]
    alike = [thing for thing in absent if thing.colour == here.colour or thing.shape == here.shape]
    pool = alike if alike and rng.integers(2) else absent
    return f"Is there a {pool[rng.integers(len(pool))]}?", "no"
