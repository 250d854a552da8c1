"""Scenes of coloured shapes: counting, naming, where things are, and whether they are there.

Existence follows the three samplings of POPE (arXiv:2305.10355, section 4.2): the thing asked about is
drawn at random, from those most frequent in all scenes, or with look-alikes beside it. Whether it is there
is a fair coin thrown after the question is chosen, so the question alone tells nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from numpy.random import Generator

from vlmix.data.synth.drawing import COLOURS, SHAPES, Canvas, Dial, Item, Pixels


class Thing(NamedTuple):
    """One coloured shape."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


class Cell(NamedTuple):
    """A place of the invisible grid that keeps things apart."""

    row: int
    column: int


THINGS: Final = tuple(Thing(colour, shape) for colour in COLOURS for shape in SHAPES)
# Drawn more often than the rest, as chairs and persons are in photographs.
POPULAR: Final = tuple(Thing(*pair) for pair in zip(COLOURS, SHAPES, strict=True))
NEGATIVES: Final = ("random", "popular", "adversarial")
_RELATIONS: Final = {"left of": 1, "right of": 1, "above": 0, "below": 0}


def count(rng: Generator, dial: Dial) -> Item:
    """How many of one thing there are, beside others that differ from it."""
    asked = THINGS[rng.integers(len(THINGS))]
    number = int(rng.integers(1, max_count(dial) + 1))
    others = [*_near(rng, asked, 1), *_others(rng, dial.between(0, 4), lambda t: t != asked)]
    pixels = paint(rng, dial, [*[asked] * number, *others])
    return Item(pixels, f"How many {asked}s are there?".replace("crosss", "crosses"), str(number))


def max_count(dial: Dial) -> int:
    """The largest number that ``count`` asks for."""
    return dial.between(3, 6)


def colour(rng: Generator, dial: Dial) -> Item:
    """The colour of the only thing of a shape."""
    asked = THINGS[rng.integers(len(THINGS))]
    others = _others(rng, dial.between(1, 6), lambda t: t.shape != asked.shape)
    return Item(paint(rng, dial, [asked, *others]), f"What colour is the {asked.shape}?", asked.colour)


def shape(rng: Generator, dial: Dial) -> Item:
    """The shape of the only thing of a colour."""
    asked = THINGS[rng.integers(len(THINGS))]
    others = _others(rng, dial.between(1, 6), lambda t: t.colour != asked.colour)
    return Item(paint(rng, dial, [asked, *others]), f"What shape is {asked.colour}?", asked.shape)


def relation(rng: Generator, dial: Dial) -> Item:
    """Whether one thing is left of, right of, above or below another."""
    first, second = (THINGS[i] for i in rng.choice(len(THINGS), 2, replace=False))
    word = tuple(_RELATIONS)[rng.integers(len(_RELATIONS))]
    true = bool(rng.integers(2))
    side = _grid_side(dial)
    low, high = sorted(int(i) for i in rng.choice(side, 2, replace=False))
    across = rng.integers(side, size=2)
    first_is_low = true == (word in {"left of", "above"})
    along = (low, high) if first_is_low else (high, low)
    cells = [
        Cell(int(b), a) if _RELATIONS[word] else Cell(a, int(b)) for a, b in zip(along, across, strict=True)
    ]
    others = _others(rng, dial.between(0, 4), lambda t: t not in {first, second})
    pixels = paint(rng, dial, [first, second, *others], cells)
    return Item(pixels, f"Is the {first} {word} the {second}?", "yes" if true else "no", {"relation": word})


def existence(rng: Generator, dial: Dial) -> Item:
    """Whether a thing is in the picture; ``negatives`` in the details says how it was drawn."""
    kind = NEGATIVES[rng.integers(len(NEGATIVES))]
    pool = POPULAR if kind == "popular" else THINGS
    asked = pool[rng.integers(len(pool))]
    true = bool(rng.integers(2))
    number = dial.between(3, 6)
    near = _near(rng, asked, 2) if kind == "adversarial" else []
    others = [*near, *_others(rng, number, lambda t: t != asked)][:number]
    if true:
        others[-1] = asked
    answer = "yes" if true else "no"
    return Item(paint(rng, dial, others), f"Is there a {asked}?", answer, {"negatives": kind})


def described(rng: Generator, dial: Dial) -> Item:
    """A few things, named row by row."""
    number = int(rng.integers(1, dial.between(2, 5) + 1))
    things = [THINGS[i] for i in rng.integers(len(THINGS), size=number)]
    side = _grid_side(dial)
    chosen = sorted(int(i) for i in rng.choice(side * side, number, replace=False))
    pixels = paint(rng, dial, things, [Cell(*divmod(i, side)) for i in chosen])
    return Item(pixels, "", ", ".join(f"a {thing}" for thing in things))


def scatter(rng: Generator, canvas: Canvas, dial: Dial, number: int, keep: tuple[int, int, int, int]) -> None:
    """Paint up to ``number`` things on cells outside the box ``keep`` (left, top, right, bottom)."""
    side = _grid_side(dial)
    step = dial.image_size // side
    left, top, right, bottom = keep
    free = [
        Cell(row, column)
        for row in range(side)
        for column in range(side)
        if (column + 1) * step <= left
        or column * step >= right
        or (row + 1) * step <= top
        or row * step >= bottom
    ]
    order = rng.permutation(len(free))[:number]
    _paint_on(rng, canvas, dial, _others(rng, len(order), lambda _: True), [free[i] for i in order])


def place(rng: Generator, canvas: Canvas, left: int, top: int, side: int) -> str:
    """Paint one thing somewhere in a square cell and return its name."""
    thing = THINGS[rng.integers(len(THINGS))]
    largest = (side - 2) // 2
    radius = int(rng.integers((2 * largest + 2) // 3, largest + 1))
    room = side - 1 - 2 * radius
    x, y = (int(start + radius + rng.random() * room) for start in (left, top))
    canvas.shape(thing.shape, thing.colour, x, y, radius)
    return str(thing)


def _near(rng: Generator, thing: Thing, number: int) -> list[Thing]:
    """Look-alikes that share either the colour or the shape, in turn."""
    start = int(rng.integers(2))
    found: list[Thing] = []
    for i in range(start, start + number):
        found += _others(rng, 1, lambda t, axis=i % 2: t != thing and t[axis] == thing[axis])
    return found


def _others(rng: Generator, number: int, allowed: Callable[[Thing], bool]) -> list[Thing]:
    """Random things among the allowed ones; popular ones are four times as likely."""
    pool = [thing for thing in (*THINGS, *POPULAR, *POPULAR, *POPULAR) if allowed(thing)]
    return [pool[i] for i in rng.integers(len(pool), size=number)]


def _grid_side(dial: Dial) -> int:
    return 3 if dial.difficulty < 0.5 else 4


def paint(rng: Generator, dial: Dial, things: Sequence[Thing], first: Sequence[Cell] = ()) -> Pixels:
    """Paint the things on cells of their own: the first on the cells given, the rest anywhere."""
    side = _grid_side(dial)
    taken = set(first)
    cells = [cell for i in rng.permutation(side * side) if (cell := Cell(*divmod(int(i), side))) not in taken]
    canvas = Canvas(rng, dial)
    _paint_on(rng, canvas, dial, things, [*first, *cells])
    return canvas.finish()


def _paint_on(
    rng: Generator, canvas: Canvas, dial: Dial, things: Sequence[Thing], cells: Sequence[Cell]
) -> None:
    step = dial.image_size // _grid_side(dial)
    largest = (step - 2) // 2  # one pixel of a cell stays free, so that neighbours never touch
    radii = rng.integers((2 * largest + 2) // 3, largest + 1, size=len(things))
    shifts = rng.random((len(things), 2))
    for thing, cell, radius, shift in zip(things, cells, radii.tolist(), shifts, strict=False):
        room = step - 1 - 2 * radius
        y, x = (int(c * step + radius + s * room) for c, s in zip(cell, shift, strict=True))
        canvas.shape(thing.shape, thing.colour, x, y, radius)
