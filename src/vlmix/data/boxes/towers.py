"""What people say about towers of stacked blocks: heights, colours, tops, bases, neighbours."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from vlmix.data.boxes.language import (
    NUMBERS,
    BoxTest,
    Countable,
    Property,
    Statement,
    article,
    boxes_with,
    draw_quantity,
    number,
    there_is,
)
from vlmix.data.boxes.scene import COLORS, Box, Scene

_COLORS = tuple(COLORS)
_ALL = (
    "All towers have",
    "All 3 towers have",
    "All the towers have",
    "Each tower has",
    "Every tower has",
    "All towers contain",
    "All three towers have",
)
_ORDINALS = ("base", "second", "third", "fourth")


def draw_tower_thing(rng: Random) -> tuple[Countable, int]:
    """Towers of some kind, or blocks of some kind, and the largest number worth naming."""
    if rng.random() < 0.3:
        return _blocks(rng), 3
    singular, plural, head = _head(rng)
    return boxes_with(rng, singular, plural, _property(rng), head), 3


def draw_tower_statement(rng: Random) -> Statement:
    """One sentence about a tower scene, in one of the forms people use."""
    form = rng.choices(
        (_counted, _all, _definite, _of_three, _bases, _alike, _colored), (70, 6, 8, 5, 2, 4, 3)
    )[0]
    return form(rng)


def _color(rng: Random) -> str:
    return rng.choice(_COLORS)


def _block(rng: Random) -> str:
    return rng.choices(("block", "square", "item", "object", "brick"), (14, 2, 1, 1, 0))[0]


def _end(rng: Random) -> tuple[str, int]:
    """``at the top`` and the place it means: the index from the base."""
    words, place = rng.choice(
        (("top", -1), ("top", -1), ("top", -1), ("base", 0), ("base", 0), ("bottom", 0))
    )
    lead = rng.choices(("at the", "as the", "on the", "at", "in the"), (8, 3, 1, 1, 1))[0]
    return f"{lead} {words}", place


def _head(rng: Random) -> tuple[str, str, BoxTest | None]:
    kind = rng.choices(("plain", "tall", "color"), (14, 2, 1))[0]
    if kind == "tall":
        height = rng.randint(1, 4)
        many = f"{number(rng, height)} block{'s' if height > 1 and rng.random() < 0.6 else ''}"
        return f"{many} tower", f"{many} towers", lambda box: len(box) == height
    if kind == "color":
        color = _color(rng)
        return f"{color} tower", f"{color} towers", lambda box: all(item.color == color for item in box)
    return "tower", "towers", None


def _height(rng: Random) -> Property:
    height, word = rng.randint(1, 4), _block(rng)
    kind = rng.choices(("bare", "exactly", "only", "least", "more"), (5, 4, 3, 3, 2))[0]
    plural = f"{word}s" if height > 1 else word
    k = number(rng, height)
    if kind == "least":
        return Property(f"at least {k} {plural}", lambda box: len(box) >= height)
    if kind == "more":
        return Property(f"more than {k} {plural}", lambda box: len(box) > height)
    lead = {"bare": "", "exactly": "exactly ", "only": "only "}[kind]
    return Property(f"{lead}{k} {plural}", lambda box: len(box) == height)


def _count_of_color(rng: Random) -> Property:
    quantity, color, word = draw_quantity(rng, 3), _color(rng), _block(rng)
    noun = f"{color} {word}{'s' if quantity.plural else ''}"
    text = article(noun) if quantity.words == "a" else f"{quantity.words} {noun}"
    if rng.random() < 0.12:
        text = f"{color} {word}s"
        return Property(text, lambda box: any(item.color == color for item in box))
    return Property(text, lambda box: quantity.admits(sum(item.color == color for item in box)))


def _at_end(rng: Random) -> Property:
    color, word = _color(rng), _block(rng)
    (end, place), one = _end(rng), rng.choices(("a", "one", "1"), (8, 1, 2))[0]
    if rng.random() < 0.1:
        return Property(f"a {color} {end.split()[-1]}", lambda box: box[place].color == color)
    return Property(f"{one} {color} {word} {end}", lambda box: box[place].color == color)


def _neighbours(rng: Random) -> Property:
    upper, lower, word = _color(rng), _color(rng), _block(rng)
    joint = rng.choices(("over", "above", "on", "on top of", "below"), (5, 5, 2, 2, 2))[0]
    a, b = (lower, upper) if joint == "below" else (upper, lower)
    if rng.random() < 0.06:
        return Property(
            f"a {a} {word} {joint} a different colored {word}",
            lambda box: any(_pair(box, i, a, joint == "below") for i in range(len(box) - 1)),
        )
    text = f"a {a} {word} {joint} a {b} {word}"
    return Property(text, lambda box: _stacked(box, upper, lower))


def _pair(box: Box, i: int, color: str, below: bool) -> bool:
    here, other = (box[i], box[i + 1]) if below else (box[i + 1], box[i])
    return here.color == color and other.color != color


def _stacked(box: Box, upper: str, lower: str) -> bool:
    return any(box[i].color == lower and box[i + 1].color == upper for i in range(len(box) - 1))


def _mixture(rng: Random) -> Property:
    parts = rng.sample(_COLORS, rng.choices((2, 3), (5, 1))[0])
    counts = [rng.choices((1, 2, 3), (6, 3, 1))[0] for _ in parts]
    loose = rng.random() < 0.8
    word = _block(rng)
    names = [
        f"{'a' if k == 1 and loose else number(rng, k)} {color} {word}{'s' if k > 1 else ''}"
        for color, k in zip(parts, counts, strict=True)
    ]
    text = f"{', '.join(names[:-1])} and {names[-1]}"

    def test(box: Box) -> bool:
        have = [sum(item.color == color for item in box) for color in parts]
        return all(n >= 1 if k == 1 and loose else n == k for n, k in zip(have, counts, strict=True))

    return Property(text, test)


def _only_colors(rng: Random) -> Property:
    parts, word = rng.sample(_COLORS, rng.choices((1, 2), (3, 2))[0]), _block(rng)
    text = f"only {' and '.join(parts)} {word}s"
    return Property(text, lambda box: {item.color for item in box} == set(parts))


def _variety(rng: Random) -> Property:
    k, word = rng.randint(1, 3), _block(rng)
    texts = {
        1: (
            "only one color",
            f"{word}s of the same color",
            f"all {word}s of the same color",
            f"{word}s of one color",
        ),
        2: ("two colors", "2 different colors", f"{word}s of two different colors", "only two colors"),
        3: (
            f"{word}s of all 3 colours",
            "all three colors",
            "3 different colors",
            f"{word}s of all 3 different colors",
        ),
    }[k]
    return Property(rng.choice(texts), lambda box: len({item.color for item in box}) == k)


def _ordinal(rng: Random) -> Property:
    place, color = rng.randint(1, 2), _color(rng)
    tail = rng.choices(("", " from the base", " from the bottom"), (3, 2, 1))[0]
    lead = rng.choice(("where", "that", "in which"))
    if rng.random() < 0.25:
        text = f"two {color} blocks as the base and second blocks"
        return Property(text, lambda box: len(box) > 1 and box[0].color == box[1].color == color)
    text = f"{lead} the {_ORDINALS[place]} block{tail} is {color}"
    return Property(text, lambda box: len(box) > place and box[place].color == color, alone=True)


def _run(rng: Random) -> Property:
    k, color = rng.choice((2, 2, 3)), _color(rng)
    tail = rng.choice(("stacked together", "stacked", "in a row", "on top of each other"))
    text = f"{number(rng, k)} {color} {_block(rng)}s {tail}"
    return Property(text, lambda box: _longest_run(box, color) >= k)


def _longest_run(box: Box, color: str) -> int:
    best = now = 0
    for item in box:
        now = now + 1 if item.color == color else 0
        best = max(best, now)
    return best


def _height_and(rng: Random) -> Property:
    tall = _height(rng)
    other = rng.choice((_at_end, _at_end, _neighbours, _count_of_color))(rng)
    joint = rng.choice(("and", "having", "with", "and it has", "with"))
    first, second = (tall, other) if rng.random() < 0.8 else (other, tall)
    return Property(f"{first.text} {joint} {second.text}", lambda box: tall.test(box) and other.test(box))


def _property(rng: Random) -> Property:
    form = rng.choices(
        (
            _at_end,
            _count_of_color,
            _height,
            _neighbours,
            _mixture,
            _only_colors,
            _variety,
            _ordinal,
            _run,
            _height_and,
        ),
        (26, 14, 12, 16, 7, 5, 5, 4, 4, 8),
    )[0]
    return form(rng)


def _blocks(rng: Random) -> Countable:
    """Blocks of a colour anywhere, or at an end of a tower."""
    color, word = _color(rng), _block(rng)
    kind = rng.choices(("all", "end", "tall_end", "on"), (3, 6, 3, 3))[0]
    if kind == "all":
        return Countable(
            f"{color} {word}",
            f"{color} {word}s",
            lambda scene: sum(item.color == color for item in scene.items),
        )
    if kind == "on":
        lower = _color(rng)
        joint = rng.choices(("above", "on", "over", "on top of"), (3, 3, 1, 1))[0]
        tail = f"{joint} a {lower} {word}"
        return _block_things(f"{color} {word}", tail, lambda box: _stacked(box, color, lower))
    end, place = _end(rng)
    tall = _height(rng) if kind == "tall_end" else Property("", lambda _box: True)
    tail = f"{end} of a tower" + (f" with {tall.text}" if tall.text else "")
    return _block_things(f"{color} {word}", tail, lambda box: box[place].color == color and tall.test(box))


def _block_things(noun: str, tail: str, test: Callable[[Box], bool]) -> Countable:
    return Countable(f"{noun} {tail}", f"{noun}s {tail}", lambda scene: sum(test(box) for box in scene.boxes))


def _counted(rng: Random) -> Statement:
    return there_is(rng, *draw_tower_thing(rng))


def _all(rng: Random) -> Statement:
    what = rng.choice((_at_end, _count_of_color, _count_of_color, _height, _variety))(rng)
    subject = rng.choice(_ALL)
    return Statement(f"{subject} {what.text}", lambda scene: all(what.test(box) for box in scene.boxes))


def _definite(rng: Random) -> Statement:
    """``The tower with four blocks has …``: true if some tower of that height has it."""
    height, color = rng.randint(1, 4), _color(rng)
    tall, what = NUMBERS[height] + (" block" if height == 1 else " blocks"), _at_end(rng)
    if rng.random() < 0.5:
        text = f"{rng.choice(('The tower with', 'the tower having', 'A tower with'))} {tall} has {what.text}"
        return Statement(
            text, lambda scene: any(len(box) == height and what.test(box) for box in scene.boxes)
        )
    end, place = rng.choice((("top", -1), ("base", 0)))
    text = f"The {end} of {rng.choice(('the', 'a'))} {tall} tower is {color}"
    return Statement(
        text, lambda scene: any(len(box) == height and box[place].color == color for box in scene.boxes)
    )


def _of_three(rng: Random) -> Statement:
    k, what = rng.randint(1, 3), rng.choice((_at_end, _count_of_color, _height))(rng)
    least = rng.random() < 0.3
    group = rng.choice(("of the towers", "of the three towers", "towers", "of the towers"))
    verb = rng.choice(("has", "have", "contains"))
    text = f"{'At least ' if least else ''}{NUMBERS[k]} {group} {verb} {what.text}"
    return Statement(
        text,
        lambda scene: (lambda n: n >= k if least else n == k)(sum(what.test(box) for box in scene.boxes)),
    )


def _bases(rng: Random) -> Statement:
    k, color, place = rng.randint(2, 3), _color(rng), rng.choice((0, -1))
    word = "base" if place == 0 else "top"
    text = rng.choice(
        (
            f"{NUMBERS[k]} of the towers have {color} {word}s",
            f"The {word}s of {NUMBERS[k]} towers are {color}",
        )
    )
    return Statement(text, lambda scene: sum(box[place].color == color for box in scene.boxes) == k)


def _alike(rng: Random) -> Statement:
    """Towers compared with each other: same height, same base colour."""
    word = rng.choice(("height", "base color", "top color", "number of blocks"))
    lead = rng.choice(
        ("at least two towers", "two towers", "only two towers", "exactly two towers", "three towers")
    )
    joint = rng.choice(("with the same", "which have the same", "that have the same", "which has the same"))

    def truth(scene: Scene) -> bool:
        kinds = len({_trait(box, word) for box in scene.boxes})
        return kinds <= 2 if lead.startswith("at") else kinds == (1 if lead.startswith("three") else 2)

    return Statement(f"There are {lead} {joint} {word}", truth)


def _trait(box: Box, word: str) -> int | str:
    if word.endswith("color"):
        return box[0 if word.startswith("base") else -1].color
    return len(box)


def _colored(rng: Random) -> Statement:
    """``There is a black tower with only one block``."""
    color = _color(rng)
    tall = _height(rng) if rng.random() < 0.5 else Property("", lambda _box: True)
    tail = f" with {tall.text}" if tall.text else ""
    thing = Countable(
        f"{color} tower{tail}",
        f"{color} towers{tail}",
        lambda scene: sum(tall.test(box) and all(item.color == color for item in box) for box in scene.boxes),
    )
    return there_is(rng, thing, 2)
