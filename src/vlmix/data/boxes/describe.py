"""Dense questions for learning to see before learning to judge: descriptions and counts."""

from __future__ import annotations

from random import Random

from vlmix.data.boxes.language import Countable, how_many
from vlmix.data.boxes.scatters import draw_item_thing
from vlmix.data.boxes.scene import SIZES, Box, Item, Scene
from vlmix.data.boxes.towers import draw_tower_thing

_SIZE_WORDS = {size: word for word, size in SIZES.items()}
DESCRIBE = "Describe the boxes."


def describe(scene: Scene) -> str:
    """Towers from the base up, scattered items from left to right with the walls they touch."""
    return "; ".join(_tower(box) if scene.towers else _items(box) for box in scene.boxes)


def count_question(rng: Random, scene: Scene, each: bool) -> tuple[str, str]:
    """``How many …?`` and the number, zero no more often than it must; with ``each`` one number per box."""
    thing = _thing(rng, scene)
    for _ in range(3):
        if thing.count(scene) > 0 or rng.random() < 0.3:
            break
        thing = _thing(rng, scene)
    if not each:
        return how_many(thing), str(thing.count(scene))
    alone = (Scene((box,), scene.towers) for box in scene.boxes)
    return f"Box by box: {how_many(thing)}", " ".join(str(thing.count(one)) for one in alone)


def _thing(rng: Random, scene: Scene) -> Countable:
    if scene.towers and rng.random() < 0.7:
        return draw_tower_thing(rng)[0]
    return draw_item_thing(rng, scene.towers)[0]


def _tower(box: Box) -> str:
    return " ".join(item.color for item in box)


def _items(box: Box) -> str:
    return ", ".join(_item(item) for item in sorted(box, key=lambda item: (item.x, item.y)))


def _item(item: Item) -> str:
    walls = [side for side in ("left", "right", "top", "bottom") if item.touches(side)]
    return " ".join([_SIZE_WORDS[item.size], item.color, item.shape, *walls])
