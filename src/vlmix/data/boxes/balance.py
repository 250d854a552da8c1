"""Statements that say nothing about their own truth: for each, true and false are equally likely."""

from __future__ import annotations

from functools import lru_cache
from random import Random

from vlmix.data.boxes.language import Statement
from vlmix.data.boxes.scatters import draw_item_statement
from vlmix.data.boxes.scene import Scene, draw_scene
from vlmix.data.boxes.towers import draw_tower_statement

_POOL = 160
_RAREST = 0.04


def draw_statement(rng: Random, towers: bool) -> Statement:
    """Any sentence for this kind of scene."""
    if towers and rng.random() < 0.8:
        return draw_tower_statement(rng)
    return draw_item_statement(rng, towers)


class Balance:
    """Accepts a statement for a scene with the chance that makes both labels equally likely for its text.

    The share of scenes a sentence is true of is measured once, on a fixed pool of scenes with as many boxes,
    and remembered; it depends on nothing else, so the answer does not depend on the order of the questions.
    """

    def __init__(self) -> None:
        self._share = dict[tuple[bool, int, str], float]()

    def draw(self, rng: Random, scene: Scene) -> tuple[str, bool]:
        """A sentence about ``scene`` and whether it is true."""
        while True:
            statement = draw_statement(rng, scene.towers)
            truth, share = statement.truth(scene), self._true_share(statement, scene)
            if not _RAREST <= share <= 1 - _RAREST:
                continue
            odds = (1 - share) / share
            if rng.random() < (odds if truth else 1 / odds):
                return statement.text, truth

    def _true_share(self, statement: Statement, scene: Scene) -> float:
        key = (scene.towers, len(scene.boxes), statement.text)
        if key not in self._share:
            pool = _pool(scene.towers, len(scene.boxes))
            self._share[key] = sum(map(statement.truth, pool)) / len(pool)
        return self._share[key]


@lru_cache
def _pool(towers: bool, boxes: int) -> tuple[Scene, ...]:
    rng = Random(f"pool {towers}")
    drawn = (draw_scene(rng, towers) for _ in range(_POOL))
    return tuple(Scene(scene.boxes[:boxes], towers) for scene in drawn)
