"""What people say about items in boxes: kinds, numbers, colours, walls, corners. Fits towers as well."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from vlmix.data.boxes.language import (
    NUMBERS,
    Countable,
    Property,
    Statement,
    article,
    boxes_with,
    draw_quantity,
    number,
    there_is,
)
from vlmix.data.boxes.scene import COLORS, SHAPES, SIZES, Box, Item, Scene

_COLORS = tuple(COLORS)


@dataclass(frozen=True, slots=True)
class Noun:
    """A kind of item: words before the place, and which items it means."""

    singular: str
    plural: str
    test: Callable[[Item], bool]
    tail: str = ""

    @property
    def one(self) -> str:
        """The singular with its place."""
        return self.singular + self.tail

    @property
    def many(self) -> str:
        """The plural with its place."""
        return self.plural + self.tail


def draw_item_thing(rng: Random, towers: bool) -> tuple[Countable, int]:
    """Items of some kind in the whole picture, or boxes of some kind."""
    if rng.random() < 0.55:
        noun = _noun(rng, towers, place=0.7)
        return Countable(noun.one, noun.many, lambda scene: sum(map(noun.test, scene.items))), 4
    singular, plural = rng.choices(
        (("box", "boxes"), ("grey box", "grey boxes"), ("grey square", "grey squares")), (6, 2, 1)
    )[0]
    return boxes_with(rng, singular, plural, _property(rng, towers)), 2


def draw_item_statement(rng: Random, towers: bool) -> Statement:
    """One sentence about a scene seen as items in boxes."""
    form = rng.choices(
        (_counted, _each, _one_of, _same_box, _colors_touching, _all_touch), (74, 6, 8, 3, 3, 6)
    )[0]
    return form(rng, towers)


def _noun(rng: Random, towers: bool, place: float = 0.0) -> Noun:
    size = rng.choice(tuple(SIZES)) if not towers and rng.random() < 0.08 else ""
    color = rng.choice(_COLORS) if rng.random() < 0.75 else ""
    shape = ("square" if towers else rng.choice(SHAPES)) if rng.random() < (0.3 if towers else 0.6) else ""
    either = rng.choice(_COLORS) if color and rng.random() < 0.04 else color
    word = shape or rng.choice(("item", "item", "object"))
    colors = color if either == color else f"{color} or {either}"
    name = " ".join(part for part in (size, colors, word) if part)
    tail, where = _place(rng, towers) if rng.random() < place else ("", None)

    def test(item: Item) -> bool:
        return (
            (not size or item.size == SIZES[size])
            and (not color or item.color in (color, either))
            and (not shape or item.shape == shape)
            and (where is None or where(item))
        )

    return Noun(name, f"{name}s", test, tail)


def _place(rng: Random, towers: bool) -> tuple[str, Callable[[Item], bool]]:
    """`` touching the edge`` and the test for it; on towers only the floor is ever touched."""
    adverb = rng.choices(("", "closely ", "nearly "), (14, 6, 1))[0]
    kind = rng.choices(
        ("wall", "not", "bottom", "corner", "side"), (8, 4, 6, 4, 2) if not towers else (6, 1, 3, 0, 0)
    )[0]
    if kind == "wall":
        target = rng.choice(("the wall", "the edge", "the wall", "an edge", "the side", "a wall", "a edge"))
        return f" {adverb}touching {target}", lambda item: item.touches("wall")
    if kind == "not":
        target = rng.choice(("any edge", "the edge", "the wall", "any wall"))
        return f" not touching {target}", lambda item: not item.touches("wall")
    if kind == "bottom":
        target = rng.choice(("the bottom of a box", "the base", "the bottom", "the base of a box"))
        return f" {adverb}touching {target}", lambda item: item.touches("bottom")
    if kind == "corner":
        target = rng.choice(("a corner", "a box corner", "the corner", "a corner of a box"))
        return f" {adverb}touching {target}", lambda item: item.in_corner()
    side = rng.choice(("right", "left", "top"))
    of = "" if rng.random() < 0.5 else " of a box"
    lead = f"{'the ' if rng.random() < 0.5 else ''}{side} wall" if side != "top" else "the top"
    return f" {adverb}touching {lead}{of}", lambda item: item.touches(side)


def _part(rng: Random, towers: bool, most: int, place: float = 0.12) -> Property:
    """``at least two black items``."""
    quantity, noun = draw_quantity(rng, most), _noun(rng, towers, place)
    name = noun.many if quantity.plural else noun.one
    text = article(name) if quantity.words == "a" else f"{quantity.words} {name}"
    return Property(text, lambda box: quantity.admits(sum(map(noun.test, box))))


def _total(rng: Random, towers: bool) -> Property:
    k = rng.randint(1, 4 if towers else 7)
    word = rng.choice(("item", "item", "object")) + ("s" if k > 1 else "")
    lead = rng.choices(("", "exactly ", "only ", "at least "), (5, 4, 2, 1))[0]
    text = f"{lead}{number(rng, k)} {word}"
    return Property(text, (lambda box: len(box) >= k) if lead == "at least " else (lambda box: len(box) == k))


def _both(rng: Random, towers: bool) -> Property:
    first, second = _part(rng, towers, 3, 0.05), _part(rng, towers, 3, 0.05)
    return Property(f"{first.text} and {second.text}", lambda box: first.test(box) and second.test(box))


def _total_and(rng: Random, towers: bool) -> Property:
    total, part = _total(rng, towers), _part(rng, towers, 3)
    joint = rng.choice(("and", "and", "one of which is", "with"))
    if joint == "one of which is":
        noun = _noun(rng, towers)
        return Property(
            f"{total.text} {joint} {article(noun.one)}",
            lambda box: total.test(box) and any(map(noun.test, box)),
        )
    return Property(f"{total.text} {joint} {part.text}", lambda box: total.test(box) and part.test(box))


def _only(rng: Random, _towers: bool) -> Property:
    parts = rng.sample(_COLORS, rng.choices((1, 2), (1, 1))[0])
    names, word = " and ".join(parts), rng.choice(("items", "items", "objects"))
    text = rng.choice(
        (f"only {names} {word}", f"{word} of only {names} color", f"{word} of only {names} colour")
    )
    return Property(text, lambda box: {item.color for item in box} == set(parts))


def _number_only(rng: Random, towers: bool) -> Property:
    parts = rng.sample(_COLORS, rng.choices((1, 2), (1, 3))[0])
    names, k = " and ".join(parts), rng.randint(len(parts), 4 if towers else 5)
    words = f"{number(rng, k)} item{'s' if k > 1 else ''}"
    text = rng.choice(
        (f"{words} of {names} color", f"only {words} of {names} color", f"{words} of only {names} colour")
    )
    return Property(text, lambda box: len(box) == k and {item.color for item in box} == set(parts))


def _variety(rng: Random, _towers: bool) -> Property:
    k = rng.randint(1, 3)
    text = {
        1: ("items of only one color", "items of the same color", "only one color"),
        2: ("items of 2 different colors", "items of two colors", "only two colors"),
        3: ("all 3 colors", "items of all 3 different colors", "all three different colors"),
    }[k]
    return Property(rng.choice(text), lambda box: len({item.color for item in box}) == k)


def _on_top(rng: Random, _towers: bool) -> Property:
    color, word = rng.choice(_COLORS), rng.choice(("item", "item", "one", "square"))
    k = rng.randint(1, 4)
    tail = rng.choice((f"and {rng.choice(('a', 'the'))} {color} {word} on top", f"and {color} one on top",
                       f"and the {color} one is on top"))  # fmt: skip
    if rng.random() < 0.25:
        return Property(f"a {color} item on top", lambda box: box[-1].color == color)
    if rng.random() < 0.25:
        return Property(
            f"all 3 colors {tail}", lambda box: len({i.color for i in box}) == 3 and box[-1].color == color
        )
    text = f"{number(rng, k)} item{'s' if k > 1 else ''} {tail}"
    return Property(text, lambda box: len(box) == k and box[-1].color == color)


def _over(rng: Random, _towers: bool) -> Property:
    upper, lower = rng.choice(_COLORS), rng.choice(_COLORS)
    joint = rng.choice(("on top of", "above", "right on top of"))
    text = f"a {upper} item {joint} a {lower} item"
    return Property(
        text,
        lambda box: any(a.color == lower and b.color == upper for a, b in pairwise(box)),
    )


def _property(rng: Random, towers: bool) -> Property:
    forms = (_part, _total, _both, _total_and, _only, _number_only, _variety, _on_top, _over)
    weights = (12, 12, 9, 5, 7, 6, 6, 14, 4) if towers else (20, 12, 14, 6, 8, 4, 6, 0, 0)
    form = rng.choices(forms, weights)[0]
    return _part(rng, towers, 4) if form is _part else form(rng, towers)  # pyright: ignore[reportCallIssue]


def _counted(rng: Random, towers: bool) -> Statement:
    return there_is(rng, *draw_item_thing(rng, towers))


def _each(rng: Random, towers: bool) -> Statement:
    """``Each box has at least one yellow item``, ``… in each box``."""
    quantity, noun = draw_quantity(rng, 2), _noun(rng, towers, 0.3)
    name = noun.many if quantity.plural else noun.one
    what = article(name) if quantity.words == "a" else f"{quantity.words} {name}"

    def truth(scene: Scene) -> bool:
        return all(quantity.admits(sum(map(noun.test, box))) for box in scene.boxes)

    subject = rng.choice(
        ("Each box has", "Each grey box contains", "Every box has", "All boxes have", "All 3 boxes have", "")
    )
    if subject:
        return Statement(f"{subject} {what}", truth)
    return Statement(f"There {'are' if quantity.plural else 'is'} {what} in each box", truth)


def _one_of(rng: Random, towers: bool) -> Statement:
    k, what = rng.choices((1, 2), (4, 1))[0], rng.choice((_total, _total, _total_and, _only))(rng, towers)
    group = rng.choice(("of the grey box", "of the grey square", "of the boxes", "of the grey squares"))
    text = f"{NUMBERS[k]} {group} {rng.choice(('has', 'contains'))} {what.text}"
    return Statement(text, lambda scene: sum(map(what.test, scene.boxes)) == k)


def _same_box(rng: Random, towers: bool) -> Statement:
    noun = _noun(rng, towers)
    text = rng.choice((f"All {noun.many} are in the same box", f"All {noun.many} are in one box"))
    return Statement(text, lambda scene: sum(any(map(noun.test, box)) for box in scene.boxes) == 1)


def _colors_touching(rng: Random, _towers: bool) -> Statement:
    """Which colours touch a wall at all."""
    k, wall = rng.randint(1, 3), rng.choice(("the wall", "the edge"))
    text = {
        1: f"There is only one color touching {wall}",
        2: f"There are {rng.choice(('2', 'two'))} different colors touching {wall}",
        3: f"All 3 different colors are touching {wall}",
    }[k]

    def truth(scene: Scene) -> bool:
        return len({item.color for item in scene.items if item.touches("wall")}) == k

    return Statement(text, truth)


def _all_touch(rng: Random, towers: bool) -> Statement:
    """``None of the black triangles are touching an edge``, ``blue squares are not touching any edge``."""
    noun, (tail, where) = _noun(rng, towers), _place(rng, towers)
    every = rng.random() < 0.5
    if not every:
        text = f"None of the {noun.many} are{tail}"
        return Statement(text, lambda scene: not any(noun.test(i) and where(i) for i in scene.items))
    text = f"{rng.choice(('All ', 'All the ', ''))}{noun.many} are{tail}"

    def truth(scene: Scene) -> bool:
        chosen: Box = tuple(filter(noun.test, scene.items))
        return bool(chosen) and all(map(where, chosen))

    return Statement(text, truth)
