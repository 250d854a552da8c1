"""What `make bench-mome` measures, once and briefly: weighing beats adding, and routers have to learn."""

import importlib.util
import sys

import pytest

from tests.conftest import ROOT
from vlmix.evals.statistics import mean_interval

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def claims():
    spec = importlib.util.spec_from_file_location("mome_claims", ROOT / "benchmarks/mome_claims.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_two_narrow_tokens_hold_what_was_asked_for_but_not_all_that_was_seen(claims):
    added, _ = claims.vision_arm(0, "add", steps=400)
    routed, weighed = claims.vision_arm(0, "router", steps=400)
    assert mean_interval(routed).value - mean_interval(added).value >= 0.05
    assert weighed["own_weight"] > 0.8
    assert weighed["own_importance"] > 0.8


def test_adapters_help_where_tasks_disagree_and_more_so_where_the_router_learns(claims):
    single, none, straight, switch = (
        claims.ladder_arm(1, arm, steps=(150, 300))
        for arm in ("single", "none", "straight_through", "switch")
    )
    assert single < none < min(straight, switch)
