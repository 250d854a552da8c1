"""Every search strategy on made-up tables: it ends, asks for nothing twice, finds what the table holds."""

import json
import math
import random
import sys

import pytest

from vlmix.core.errors import InputError, RecipeError, UnknownNameError
from vlmix.core.parts import read_part
from vlmix.search.points import Space
from vlmix.search.settings import RangeSettings
from vlmix.search.strategies import STRATEGIES
from vlmix.search.strategies._base import Gain

POOL = ("clip", "convnext", "sam", "dino", "pix", "eva")
AXES = {"model.fusion.kind": ["a", "b", "c"], "stages.0.steps": [1, 2]}
NEEDS = {"optuna": "optuna"}


class Table:
    """Findings out of a function of the choice; a gain of more than ``least`` is enough."""

    def __init__(self, worth, least=0.0, stops=True):
        self.worth, self.least, self.stops, self.known = worth, least, stops, set()

    def value(self, point):
        assert point in self.known, "it was asked about before it was tried"
        return self.worth(point)

    def gain(self, point, over):
        value = self.value(point) - self.value(over)
        return Gain(value, None, None, value > self.least, f"it brings {value:+.3g}")


def strategy(kind, **settings):
    pytest.importorskip(NEEDS.get(kind, "json"), reason="needs the extra `search`")
    cls = STRATEGIES.get(kind)
    raw = {**cls.settings_class.tiny().model_dump(), **settings}
    return cls(read_part(STRATEGIES, raw))


def walk(made, space, table):
    """Go through all rounds; what was asked for, round by round, and the end."""
    made.check(space)
    rounds, asked = made.rounds(space, table), []
    try:
        current = next(rounds)
        while True:
            asked.append(current.points)
            table.known |= set(current.points)
            current = next(rounds)
    except StopIteration as ended:
        return asked, ended.value


def additive(**worth):
    return lambda point: sum(worth.get(name, 0.0) for name in point.encoders)


def space_for(kind):
    return Space((), AXES) if kind == "grid" else Space(POOL)


@pytest.mark.parametrize("kind", STRATEGIES.names())
def test_it_ends_within_what_it_said_and_with_the_best_it_saw(kind):
    for seed in range(5):
        chance = random.Random(seed)
        worth = {name: chance.uniform(0.1, 1) for name in POOL}

        def of(point, worth=worth):
            return additive(**worth)(point) + sum(len(value) for _, value in point.settings) / 100

        made, space, table = strategy(kind), space_for(kind), Table(of)
        asked, found = walk(made, space, table)
        points = [point for some in asked for point in some]
        assert len({*points}) <= made.most(space)
        if kind != "optuna":
            assert len({*points}) == len(points)
        assert of(found.best) == max(map(of, points)) or found.notes
        assert found.path[0].taken
        assert {step.point for step in found.path} <= {*points}
        assert all(some for some in asked)


@pytest.mark.parametrize("kind", STRATEGIES.names())
def test_what_was_found_before_decides_so_that_a_search_can_be_taken_up(kind):
    def of(point):
        return additive(clip=0.5, eva=0.3, sam=-0.1)(point)

    walks = [walk(strategy(kind), space_for(kind), Table(of)) for _ in range(2)]
    assert walks[0] == walks[1]


@pytest.mark.parametrize("kind", STRATEGIES.names())
def test_failed_choices_are_survived_and_wrong_spaces_refused(kind):
    def of(point):
        return -math.inf if "sam" in point.encoders or '"b"' in str(point.settings) else len(point.encoders)

    _, found = walk(strategy(kind), space_for(kind), Table(of))
    assert math.isfinite(of(found.best)) or kind == "leave_one_out"
    with pytest.raises(RecipeError, match=f"strategy {kind}: .*name"):
        strategy(kind).check(Space())
    settings = STRATEGIES.get(kind).settings_class.tiny().model_dump(mode="json")
    assert read_part(STRATEGIES, json.loads(json.dumps(settings))).model_dump(mode="json") == settings


def test_round_robin_trains_five_four_three_two_one_beside_its_start():
    worth = dict(zip(POOL, (0.5, 0.4, 0.1, -0.2, 0.2, 0.3), strict=True))
    asked, found = walk(strategy("round_robin"), Space(POOL), Table(additive(**worth), stops=False))
    assert [len(points) for points in asked] == [1, 5, 4, 3, 2, 1]
    assert sum(map(len, asked)) == strategy("round_robin").most(Space(POOL)) == 16
    taken = [step.point.label for step in found.path if step.taken]
    assert taken[:3] == ["clip", "clip + convnext", "clip + convnext + eva"]
    assert found.best.encoders == ("clip", "convnext", "sam", "pix", "eva"), (
        "the sixth lowers it, as in the paper"
    )
    asked, found = walk(strategy("round_robin"), Space(POOL), Table(additive(**worth), least=0.15))
    assert [len(points) for points in asked] == [1, 5, 4, 3, 2]
    assert found.best.encoders == ("clip", "convnext", "pix", "eva")
    assert "Stopped at clip + convnext + pix + eva: the best addition" in found.notes[0]
    asked, _ = walk(
        strategy("round_robin", start=["eva", "sam"], most=3), Space(POOL), Table(additive(**worth))
    )
    assert [len(points) for points in asked] == [1, 4]


def test_the_others_find_what_they_are_for():
    def redundant(point):  # clip and sam see the same; dino harms
        seen = {"sam" if name == "clip" else name for name in point.encoders}
        return sum({"sam": 0.5, "convnext": 0.4, "dino": -0.3}.get(name, 0.0) for name in seen)

    pool = Space(("clip", "sam", "convnext", "dino"))
    asked, found = walk(strategy("leave_one_out"), pool, Table(redundant))
    assert [len(points) for points in asked] == [1, 4]
    assert [note.partition(":")[0] for note in found.notes] == [
        "clip is not needed", "sam is not needed", "convnext is needed", "dino is not needed",
    ]  # fmt: skip
    assert found.best.encoders == ("clip", "sam", "convnext")
    _, found = walk(strategy("leave_one_out", again=True), pool, Table(redundant))
    assert set(found.best.encoders) in ({"clip", "convnext"}, {"sam", "convnext"})
    asked, found = walk(strategy("anchor_plus_complement"), pool, Table(redundant))
    assert [len(points) for points in asked] == [4, 3]
    assert found.best.encoders == ("clip", "convnext")
    asked, found = walk(strategy("exhaustive", always=["dino"], most=3), pool, Table(redundant))
    assert [len(points) for points in asked] == [1, 3, 3]
    with pytest.raises(RecipeError, match="no mixture"):
        strategy("exhaustive", least=9).check(pool)
    mixed = Space(pool.pool, AXES, (("clip",), ("sam", "convnext")))
    asked, found = walk(strategy("grid"), mixed, Table(redundant))
    assert len(asked[0]) == 2 * 3 * 2
    assert found.best.encoders == ("sam", "convnext")
    assert found.best.label == 'sam + convnext, model.fusion.kind="a", stages.0.steps=1'


def test_mistakes_in_settings_name_the_remedy():
    with pytest.raises(UnknownNameError, match="Did you mean 'clip'"):
        strategy("round_robin", start=["clp"]).check(Space(POOL))
    with pytest.raises(RecipeError, match="remove `axes`"):
        strategy("exhaustive").check(Space(POOL, AXES))
    with pytest.raises(RecipeError, match="take the strategy optuna"):
        strategy("grid").check(Space((), {"seed": RangeSettings(low=0, high=1)}))
    with pytest.raises(UnknownNameError, match="Did you mean 'round_robin'"):
        STRATEGIES.get("round_robbin")


def test_without_optuna_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    cls = STRATEGIES.get("optuna")
    with pytest.raises(InputError, match=r"strategy optuna needs the extra `search`.*vlmix\[search\]"):
        cls(cls.settings_class.tiny()).check(Space((), AXES))


def test_optuna_searches_ranges_and_steers_towards_the_best():
    axes = {
        "rate": RangeSettings(low=1e-4, high=1e-1, log=True),
        "steps": RangeSettings(low=1, high=9, whole=True),
    }
    made = strategy("optuna", trials=40, batch=2)

    def of(point):
        settings = {key: json.loads(value) for key, value in point.settings}
        assert isinstance(settings["steps"], int)
        return -abs(math.log10(settings["rate"]) + 2) - abs(settings["steps"] - 4) / 10

    asked, found = walk(made, Space((), axes), Table(of))
    assert of(found.best) > -0.3
    assert len(asked) == 20
