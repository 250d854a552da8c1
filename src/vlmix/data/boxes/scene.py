"""Three boxes of items, the record behind a picture: how one is drawn at random or read from a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

SIDE = 100
COLORS = {"yellow": "Yellow", "black": "Black", "blue": "#0099ff"}
SHAPES = ("circle", "square", "triangle")
SIZES = {"small": 10, "medium": 20, "big": 30}
_WORDS = {value.lower(): word for word, value in COLORS.items()}


@dataclass(frozen=True, slots=True)
class Item:
    """One shape: its upper left corner and side in pixels of a 100 x 100 box."""

    x: int
    y: int
    size: int
    shape: str
    color: str

    def touches(self, side: str) -> bool:
        """Whether the item touches this side (left, right, top, bottom) of its box, or any ``wall``."""
        if side == "wall":
            return any(self.touches(one) for one in ("left", "right", "top", "bottom"))
        gaps = {
            "left": self.x,
            "top": self.y,
            "right": SIDE - self.x - self.size,
            "bottom": SIDE - self.y - self.size,
        }
        return gaps[side] <= 0

    def in_corner(self) -> bool:
        """Whether the item touches two walls that meet."""
        return (self.touches("left") or self.touches("right")) and (
            self.touches("top") or self.touches("bottom")
        )


Box = tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class Scene:
    """Three boxes; the items of a tower stand in order from the base to the top."""

    boxes: tuple[Box, ...]
    towers: bool

    @property
    def items(self) -> Box:
        """The items of all boxes."""
        return tuple(item for box in self.boxes for item in box)


def draw_scene(rng: Random, towers: bool) -> Scene:
    """A random scene with the published set's proportions: heights 1 to 4, or 1 to 7 scattered items."""
    return Scene(tuple(_tower(rng) if towers else _scatter(rng) for _ in range(3)), towers)


def read_scene(records: Sequence[Sequence[Mapping[str, Any]]]) -> Scene:
    """The scene of a published record (``structured_rep``)."""
    boxes = tuple(
        tuple(
            Item(one["x_loc"], one["y_loc"], one["size"], one["type"], _WORDS[one["color"].lower()])
            for one in box
        )
        for box in records
    )
    towers = all(_is_tower(box) for box in boxes)
    return Scene(
        tuple(tuple(sorted(box, key=lambda item: -item.y)) if towers else box for box in boxes), towers
    )


def _is_tower(box: Box) -> bool:
    return all((item.x, item.size, item.shape) == (40, 20, "square") for item in box)


def _palette(rng: Random) -> list[str]:
    return rng.sample(list(COLORS), rng.choices((1, 2, 3), (1, 2, 5))[0])


def _tower(rng: Random) -> Box:
    colors = _palette(rng)
    return tuple(
        Item(40, 80 - 21 * level, 20, "square", rng.choice(colors)) for level in range(rng.randint(1, 4))
    )


def _scatter(rng: Random) -> Box:
    colors, box = _palette(rng), list[Item]()
    shapes = rng.sample(SHAPES, rng.choices((1, 2, 3), (1, 2, 9))[0])
    for _ in range(rng.randint(1, 7)):
        shape, color, size = rng.choice(shapes), rng.choice(colors), rng.choice(tuple(SIZES.values()))
        for _attempt in range(20):
            item = Item(*_place(rng, size), size, shape, color)
            if not any(_overlap(item, other) for other in box):
                box.append(item)
                break
    return tuple(box)


def _place(rng: Random, size: int) -> tuple[int, int]:
    """A position; one in five items lies on the floor and one in five at a side wall, as published."""
    room = SIDE - size
    x = rng.choice((0, room)) if rng.random() < 0.2 else rng.randint(0, room)
    y = room if rng.random() < 0.2 else rng.randint(0, room)
    return x, y


def _overlap(a: Item, b: Item) -> bool:
    return (
        a.x < b.x + b.size + 1
        and b.x < a.x + a.size + 1
        and a.y < b.y + b.size + 1
        and b.y < a.y + a.size + 1
    )
