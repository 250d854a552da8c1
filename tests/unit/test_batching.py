"""Micro-batches from lengths alone: every sample once, budgets kept, kinds apart, the same for any world."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmix.core.batching import BatchingSettings
from vlmix.core.errors import RecipeError
from vlmix.core.settings import read_settings
from vlmix.train.batching import Shape, deal_window, plan_micro_batches

SHAPES = st.lists(st.builds(Shape, st.integers(1, 90), st.integers(0, 2)), min_size=1, max_size=40)


def settings(**given_):
    return read_settings(BatchingSettings, given_)


@given(SHAPES, st.integers(1, 9), st.booleans())
def test_counted_micro_batches_hold_every_sample_once_and_kinds_apart(shapes, size, group):
    plan = plan_micro_batches(shapes, settings(group=group), size)
    assert sorted(at for batch in plan for at in batch) == list(range(len(shapes)))
    assert all(0 < len(batch) <= size for batch in plan)
    if group:
        assert all(len({shapes[at].pictures > 0 for at in batch}) == 1 for batch in plan)
    else:
        assert [at for batch in plan for at in batch] == list(range(len(shapes)))


@given(SHAPES, st.integers(10, 200), st.booleans())
def test_a_budget_counts_padding_and_only_a_longer_sample_exceeds_it_alone(shapes, budget, pack):
    plan = plan_micro_batches(shapes, settings(tokens=budget, pack=pack), 1)
    assert sorted(at for batch in plan for at in batch) == list(range(len(shapes)))
    for batch in plan:
        lengths = [shapes[at].tokens for at in batch]
        held = sum(lengths) if pack else max(lengths) * len(lengths)
        assert held <= budget or len(batch) == 1


@given(SHAPES, st.integers(20, 200))
def test_packed_rows_are_at_least_half_full_but_one_of_each_kind(shapes, budget):
    plan = plan_micro_batches(shapes, settings(tokens=budget, pack=True), 1)
    for pictured in (False, True):
        held = [sum(shapes[at].tokens for at in b) for b in plan if (shapes[b[0]].pictures > 0) == pictured]
        assert sum(2 * each <= budget for each in held) <= 1


def test_grouping_spares_padding():
    shapes = [Shape(10 + 70 * (i % 3), i % 2) for i in range(24)]

    def positions(**given_):
        plan = plan_micro_batches(shapes, settings(**given_), 4)
        return sum(len(batch) * max(shapes[at].tokens for at in batch) for batch in plan)

    true = sum(shape.tokens for shape in shapes)
    assert positions(group=True) == true
    assert positions(group=False) > 1.5 * true


@given(SHAPES, st.integers(1, 9), st.integers(0, 3))
def test_a_window_deals_every_sample_once_by_length_and_shuffles_its_steps(shapes, batch_size, seed):
    steps = deal_window(shapes, batch_size, (seed, 2, 0, 1))
    assert sorted(at for step in steps for at in step) == list(range(len(shapes)))
    assert sorted(map(len, steps))[1:] == [batch_size] * (len(steps) - 1)
    assert steps == deal_window(shapes, batch_size, (seed, 2, 0, 1))
    spans = sorted(
        (min(keys), max(keys))
        for keys in ([(shapes[at].pictures > 0, shapes[at].tokens) for at in step] for step in steps)
    )
    assert all(left[1] <= right[0] for left, right in pairwise(spans))


@pytest.mark.parametrize("wrong", [{"pack": True}, {"window": 2, "group": False}, {"tokens": 0}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(RecipeError):
        settings(**wrong)
