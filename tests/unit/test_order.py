"""Data order is a pure function of seed, epoch and step, and a mix keeps its shares."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmix.core.errors import RecipeError
from vlmix.train import order as module
from vlmix.train.order import DataOrder, RowId, group_weights


def plan(sizes, weights=None, batch_size=3, seed=(0, 0), **length):
    length = {"steps": None, "epochs": None, **length}
    return DataOrder.plan(sizes, weights or [None] * len(sizes), batch_size, seed, **length)


def drawn(order, steps=None):
    return [row for step in range(steps or order.steps) for row in order.rows_for_step(step)]


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=4),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(0, 9),
)
def test_without_weights_an_epoch_has_every_row_once(sizes, batch_size, epochs, seed):
    order = plan(sizes, batch_size=batch_size, epochs=epochs, seed=(seed, 1))
    rows = drawn(order)
    every = {RowId(source, row) for source, size in enumerate(sizes) for row in range(size)}
    for epoch in range(epochs):
        part = rows[epoch * sum(sizes) : (epoch + 1) * sum(sizes)]
        assert len(part) == len(every)
        assert set(part) == every
    assert order.rows_for_step(order.steps) == []


@given(st.lists(st.floats(0.05, 1), min_size=2, max_size=3), st.integers(0, 5))
def test_weights_are_shares_and_a_source_is_dealt_whole_before_it_repeats(weights, seed):
    sizes = [50, 20, 7][: len(weights)]
    order = plan(sizes, weights, seed=(seed, 0), epochs=6)
    counts = Counter((row.source, row.row) for row in drawn(order))
    for source, weight in enumerate(weights):
        draws = [counts[source, row] for row in range(sizes[source])]
        assert sum(draws) == pytest.approx(weight / sum(weights) * 6 * sum(sizes), abs=6)
        assert max(draws) - min(draws) <= 1


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(10, 60)), min_size=2, max_size=6),
    st.integers(0, 5),
)
def test_groups_share_alike_and_their_sources_by_rows(mix, seed):
    groups, sizes = [name for name, _ in mix], [size for _, size in mix]
    order = plan(sizes, group_weights(groups, sizes), seed=(seed, 0), epochs=6)
    draws = Counter(row.source for row in drawn(order))
    for name in {*groups}:
        members = [source for source, of in enumerate(groups) if of == name]
        rows = sum(sizes[source] for source in members)
        # An epoch rounds each source's share to whole draws, six times alike.
        assert sum(draws[s] for s in members) == pytest.approx(
            6 * sum(sizes) / len({*groups}), abs=6 * len(mix)
        )
        for source in members:
            share = sizes[source] / rows / len({*groups})
            assert draws[source] == pytest.approx(6 * sum(sizes) * share, abs=6)


def test_without_groups_there_are_no_weights():
    assert group_weights(["", ""], [3, 4]) == [None, None]


def test_any_step_can_be_asked_for_in_any_order_and_from_a_fresh_process(monkeypatch):
    order = plan([40, 9], [1.0, 2.0], seed=(7, 2), steps=30)
    forwards = [order.rows_for_step(step) for step in range(30)]
    module._permutation.cache_clear()
    module._mix.cache_clear()
    again = plan([40, 9], [1.0, 2.0], seed=(7, 2), steps=30)
    assert [again.rows_for_step(step) for step in reversed(range(30))][::-1] == forwards
    # The very rows, so that a change of the algorithm, which breaks old runs' resumption, is noticed.
    assert forwards[0] == GOLDEN


GOLDEN = [RowId(1, 3), RowId(0, 21), RowId(1, 0)]


def test_seeds_stages_and_epochs_give_different_orders():
    orders = [drawn(plan([50], seed=seed, epochs=1)) for seed in ((0, 0), (1, 0), (0, 1))]
    two = drawn(plan([50], epochs=2))
    seen = [tuple(rows) for rows in (*orders, two[50:])]
    assert len(set(seen)) == 4


@pytest.mark.parametrize(
    ("length", "steps", "last"), [({"steps": 4}, 4, 3), ({"epochs": 1}, 4, 1), ({"epochs": 0.5}, 2, 2)]
)
def test_length(length, steps, last):
    order = plan([10], **length)
    assert order.steps == steps
    assert len(order.rows_for_step(steps - 1)) == last


def test_empty_sources_and_vanishing_weights_are_refused():
    with pytest.raises(RecipeError, match=r"data\.1: this source has no rows"):
        plan([3, 0], steps=1)
    with pytest.raises(RecipeError, match=r"data\.1: its weight gives it none of the 13 draws"):
        plan([10, 3], [1000.0, 1.0], steps=1)


def test_the_fingerprint_sees_what_the_order_depends_on():
    same = plan([10, 5], steps=3).fingerprint
    others = [plan([10, 6], steps=3), plan([10, 5], steps=4), plan([10, 5], steps=3, seed=(1, 0))]
    assert same == plan([10, 5], steps=3).fingerprint
    assert same not in {other.fingerprint for other in others}
