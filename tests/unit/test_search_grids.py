"""Grids: shipped ones compose, the documented one reads, and a trial's digest is that of what it trains."""

import re
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from vlmix.core.errors import RecipeError
from vlmix.core.parts import read_part
from vlmix.core.settings import read_settings
from vlmix.search.compose import Composer
from vlmix.search.grid_file import load_grid, shipped_grids
from vlmix.search.points import Space
from vlmix.search.settings import Grid
from vlmix.search.strategies import STRATEGIES
from vlmix.train.build import check_parts, recipe_config
from vlmix.train.recipe_file import shipped_recipes

SHARED = Path("shared")


@pytest.fixture(scope="module")
def tiny():
    return Composer.of(load_grid("round_robin_tiny"))


@pytest.mark.parametrize("name", shipped_grids())
def test_a_shipped_grid_plans(name):
    grid = load_grid(name)
    assert grid.name == name
    assert name not in shipped_recipes()
    composer, space = Composer.of(grid), Space.of(grid)
    strategy = STRATEGIES.get(grid.strategy["kind"])(read_part(STRATEGIES, grid.strategy))
    strategy.check(space)
    assert strategy.most(space) > 1
    start, _ = composer.start(SHARED)
    check_parts(start)
    assert recipe_config(start).plan().tokens > 0
    for point in [space.point([name]) for name in space.pool]:
        check_parts(composer.recipe(point, 0, SHARED))


def test_the_documented_grids_read():
    text = (ROOT / "docs/systems/search.md").read_text(encoding="utf-8")
    whole, axes = re.findall(r"```yaml\n(.*?)```", text, re.S)
    raw = yaml.safe_load(whole)
    assert read_settings(Grid, raw).seeds == [0, 1]
    grid = read_settings(Grid, {**raw, **yaml.safe_load(axes)})
    STRATEGIES.get("round_robin")(read_part(STRATEGIES, raw["strategy"])).check(
        Space.of(read_settings(Grid, raw))
    )
    with pytest.raises(RecipeError, match="take the strategy optuna"):
        STRATEGIES.get("grid")(read_part(STRATEGIES, {"kind": "grid"})).check(Space.of(grid))


def test_a_trial_is_each_encoder_alone_and_then_the_recipe(tiny):
    space = Space.of(tiny.grid)
    recipe = tiny.recipe(space.point(["loud", "again", "red"]), 7, SHARED)
    assert [stage.name for stage in recipe.stages] == ["align_red", "align_again", "join"]
    assert [stage.solo and stage.solo.encoder for stage in recipe.stages] == [0, 1, None]
    assert [next(iter(stage.train)) for stage in recipe.stages[:2]] == ["encoders.0.*", "encoders.1.*"]
    loads = [(raw["encoder"], raw["from"]) for stage in recipe.stages for raw in stage.before]
    assert loads == [(0, 0), (1, 2), (2, 3)], "its place in the mixture, and in the pool"
    assert recipe.seed == 7
    assert recipe.results == "shared/aligned"
    start, folder = tiny.start(SHARED)
    assert recipe.model.language_model == {"weights": f"{folder}/words"}
    assert start.model.fusion["norm"]
    assert "norm" not in recipe.model.fusion


def test_the_digest_tells_what_is_trained_and_nothing_else(tiny):
    space = Space.of(tiny.grid)
    key = tiny.key(space.point(["red", "rest"]), 0)
    assert tiny.key(space.point(["rest", "red"]), 0) == key
    assert tiny.key(space.point(["rest", "red"]), 1) != key
    assert tiny.key(space.point(["rest"]), 0) != key
    longer = Composer.of(load_grid("round_robin_tiny", ["align.stage.steps=9"]))
    assert longer.key(space.point(["red", "rest"]), 0) != key
    other = Composer.of(load_grid("round_robin_tiny", ["start.stages.0.steps=9"]))
    assert other.key(space.point(["red", "rest"]), 0) != key
    named = Composer.of(
        load_grid("round_robin_tiny", ["name=another", "strategy={kind: exhaustive}", "stop=null"])
    )
    assert named.key(space.point(["red", "rest"]), 0) == key
    steps = space.point(["red", "rest"], {"stages.0.epochs": 3})
    assert tiny.key(steps, 0) != key
    assert tiny.recipe(steps, 0, SHARED).stages[-1].epochs == 3
