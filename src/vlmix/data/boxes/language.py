"""The pieces sentences are made of: things that can be counted, quantifiers, and the statement itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from vlmix.data.boxes.scene import Box, Scene

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven")
_KINDS = {
    "a": 22,
    "": 25,
    "exactly": 12,
    "at least": 12,
    "atleast": 2,
    "only": 6,
    "no": 5,
    "more than": 3,
    "at most": 2,
    "at least a": 1,
}
BoxTest = Callable[[Box], bool]


@dataclass(frozen=True, slots=True)
class Statement:
    """A sentence and when it is true."""

    text: str
    truth: Callable[[Scene], bool]


@dataclass(frozen=True, slots=True)
class Countable:
    """Something a scene has some of: its name in singular and plural, and how many there are."""

    singular: str
    plural: str
    count: Callable[[Scene], int]


@dataclass(frozen=True, slots=True)
class Property:
    """What a box or tower may have. ``text`` follows ``has``, or stands alone where ``alone`` is set."""

    text: str
    test: BoxTest
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Quantity:
    """``at least two`` and the like: words, whether a plural follows, and which numbers it admits."""

    words: str
    plural: bool
    admits: Callable[[int], bool]


def number(rng: Random, value: int) -> str:
    """``2`` or ``two``."""
    return NUMBERS[value] if rng.random() < 0.6 else str(value)


def article(word: str) -> str:
    """``a`` or ``an``, for the words used here."""
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def draw_quantity(rng: Random, most: int) -> Quantity:
    """A quantity that speaks of up to ``most`` things; a bare number means exactly so many."""
    k = rng.choices(range(1, most + 1), [2.0**-step for step in range(most)])[0]
    kind = rng.choices(tuple(_KINDS), tuple(_KINDS.values()))[0]
    if kind in ("a", "at least a"):
        return Quantity(kind, False, lambda n: n >= 1)
    if kind == "no":
        return Quantity(kind, False, lambda n: n == 0)
    return Quantity(f"{kind} {number(rng, k)}".strip(), k > 1, _bound(kind, k))


def _bound(kind: str, k: int) -> Callable[[int], bool]:
    if kind in ("at least", "atleast"):
        return lambda n: n >= k
    if kind == "more than":
        return lambda n: n > k
    if kind == "at most":
        return lambda n: n <= k
    return lambda n: n == k


def phrase(quantity: Quantity, thing: Countable) -> str:
    """``two blue blocks``, ``an item touching the wall``."""
    noun = thing.plural if quantity.plural else thing.singular
    return article(noun) if quantity.words == "a" else f"{quantity.words} {noun}"


def there_is(rng: Random, thing: Countable, most: int) -> Statement:
    """``There are exactly two …``, sometimes without the first two words."""
    quantity = draw_quantity(rng, most)
    text = phrase(quantity, thing)
    if rng.random() < 0.96:
        text = f"There {'are' if quantity.plural else 'is'} {text}"
    return Statement(text, lambda scene: quantity.admits(thing.count(scene)))


def boxes_with(
    rng: Random, singular: str, plural: str, what: Property, head: BoxTest | None = None
) -> Countable:
    """The boxes (towers) that have a property, as in ``tower which has a blue block at the top``."""
    if what.alone:
        one = many = what.text
    else:
        joint = rng.choices(
            (
                ("with", "with"),
                ("which has", "which have"),
                ("that has", "that have"),
                ("having", "having"),
                ("that contains", "that contain"),
                ("containing", "containing"),
                ("which has", "which has"),
                ("that has", "that has"),
            ),
            (12, 2, 2, 2, 1, 1, 1, 1),
        )[0]
        one, many = (f"{word} {what.text}" for word in joint)

    def count(scene: Scene) -> int:
        return sum(what.test(box) and (head is None or head(box)) for box in scene.boxes)

    return Countable(f"{singular} {one}", f"{plural} {many}", count)


def how_many(thing: Countable) -> str:
    """The question that asks for the count itself."""
    return f"How many {thing.plural}?"
