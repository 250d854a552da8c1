"""Intervals: published values, properties, and coverage on data whose truth is known."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmix.core.errors import InputError
from vlmix.core.sample import Score
from vlmix.evals.statistics import figure_interval, mean_interval, paired_difference, wilson


def scores_of(values, groups=None, prefix="q"):
    groups = groups or [""] * len(values)
    return [
        Score(f"{prefix}{i}", float(v), "", "t", g)
        for i, (v, g) in enumerate(zip(values, groups, strict=True))
    ]


def mean(scores):
    return sum(score.value for score in scores) / len(scores)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # Newcombe 1998 (two-sided intervals for a single proportion), table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_matches_the_published_table(right, n, low, high):
    found = wilson(right / n, n)
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)


@given(st.integers(1, 4000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_value_mirrors_and_narrows(case):
    right, n = case
    found, mirror = wilson(right / n, n), wilson((n - right) / n, n)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.low < found.high
    assert math.isclose(found.low, 1 - mirror.high, abs_tol=1e-12)
    wider = wilson(right / n, n * 4)
    assert wider.high - wider.low < found.high - found.low


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from(["a", "b", "c", ""])),
        min_size=1,
        max_size=25,
    ),
    st.randoms(use_true_random=False),
)
def test_any_scores_give_an_interval_that_forgets_their_order(rows, random):
    scores = scores_of([value for value, _ in rows], [group for _, group in rows])
    shuffled = random.sample(scores, len(scores))
    found = mean_interval(scores, resamples=200)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert math.isclose(found.value, mean(scores))
    assert mean_interval(shuffled, resamples=200) == found
    assert found == mean_interval(scores, resamples=200), "the same scores gave another interval"
    by_figure = figure_interval(lambda s: math.fsum(x.value for x in s) / len(s), scores, resamples=50)
    assert by_figure.low <= by_figure.value <= by_figure.high


def test_groups_that_agree_within_widen_the_interval():
    values = [g % 2 for g in range(40) for _ in range(6)]
    alone = mean_interval(scores_of(values))
    grouped = mean_interval(scores_of(values, [f"g{i // 6}" for i in range(240)]))
    assert (alone.method, grouped.method, grouped.groups) == ("wilson", "cluster bootstrap", 40)
    ratio = (grouped.high - grouped.low) / (alone.high - alone.low)
    assert math.isclose(ratio, math.sqrt(6), rel_tol=0.1), "six equal scores are worth one"


def test_a_perfect_score_on_few_groups_is_not_certain():
    scores = scores_of([1] * 60, [f"g{i // 6}" for i in range(60)])
    found, whole = mean_interval(scores), wilson(1.0, 10)
    assert (found.low, found.n, found.groups) == (whole.low, 60, 10)


def smallest_of_each_group(scores):
    by_group = {}
    for score in scores:
        by_group.setdefault(score.group, []).append(score.value)
    return [min(values) for values in by_group.values()]


def test_a_figure_at_its_end_counts_only_the_groups_it_depends_on():
    scores = scores_of([1] * 60, [f"g{i // 6}" for i in range(60)])
    found = figure_interval(lambda s: min([x.value for x in s if x.group < "g3"], default=None), scores)
    assert found.low == wilson(1.0, 3).low
    mixed = scores_of([0, 1, 1] * 20, [f"g{i // 3}" for i in range(60)])
    never = figure_interval(lambda s: float(np.mean(smallest_of_each_group(s))), mixed)
    assert (never.value, never.high) == (0.0, wilson(0.0, 20).high)


def test_a_mean_over_whole_tasks_is_recognised_and_nothing_else():
    scores = [replace(s, task=f"t{i % 3}") for i, s in enumerate(scores_of([1, 0, 1, 1, 1, 0] * 30))]
    two = [s for s in scores if s.task != "t1"]
    found = figure_interval(lambda s: mean([x for x in s if x.task != "t1"] or s), scores)
    assert found == mean_interval(two)
    macro = figure_interval(lambda s: (mean([x for x in s if x.task == "t0"] or s) + mean(s)) / 2, scores)
    assert macro.method == "cluster bootstrap"


def test_a_group_drawn_twice_counts_as_two_groups():
    scores = scores_of([1, 1, 1, 0] * 30, [f"g{i // 2}" for i in range(120)])
    found = figure_interval(lambda s: float(np.mean(smallest_of_each_group(s))), scores)
    assert found.value == 0.5
    assert math.isclose(found.low, wilson(0.5, 60).low, abs_tol=0.02)
    assert math.isclose(found.high, wilson(0.5, 60).high, abs_tol=0.02)


@pytest.mark.parametrize("grouped", [False, True], ids=["alone", "grouped"])
def test_the_truth_lies_inside_about_95_times_in_100(grouped):
    random, inside = np.random.default_rng(5), 0
    for trial in range(300):
        rates = random.beta(2, 2, 60) if grouped else np.full(60, 0.5)
        values = (random.random((60, 4)) < rates[:, None]).astype(float).ravel()
        groups = [f"g{i // 4}" for i in range(240)] if grouped else None
        found = mean_interval(scores_of(values, groups), resamples=400, seed=trial)
        inside += found.low <= 0.5 <= found.high
    assert 0.91 <= inside / 300 <= 0.985


def test_paired_interval_matches_the_published_example():
    # Newcombe 1998 (paired data), table II, method 10: 36 both, 12 first only, 2 second only, 0 neither
    a, b = [1] * 36 + [1] * 12 + [0] * 2, [1] * 36 + [0] * 12 + [1] * 2
    found = paired_difference(scores_of(a), scores_of(b))
    assert found.value == pytest.approx(0.2)
    assert (round(found.low, 4), round(found.high, 4)) == (0.0569, 0.3404)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([0, 1]), st.sampled_from([0, 1])), min_size=2, max_size=40),
    st.booleans(),
)
def test_paired_difference_is_antisymmetric_and_bounded(rows, grouped):
    groups = [f"g{i // 2}" for i in range(len(rows))] if grouped else None
    a, b = scores_of([x for x, _ in rows], groups), scores_of([y for _, y in rows], groups)
    found, back = paired_difference(a, b, resamples=400), paired_difference(b, a, resamples=400)
    assert -1 <= found.low <= found.value <= found.high <= 1
    assert math.isclose(found.value, mean(a) - mean(b), abs_tol=1e-9)
    assert math.isclose(found.low, -back.high, abs_tol=1e-9)
    assert found.low < found.high, "a difference on finitely many questions is never certain"


def test_pairing_uses_common_ids_only_and_refuses_strangers():
    a, b = scores_of([1, 1, 0, 1]), scores_of([0, 1, 0])
    assert paired_difference(a, b).n == 3
    with pytest.raises(InputError, match="no sample id in common"):
        paired_difference(a, scores_of([1], prefix="other"))
    with pytest.raises(InputError, match="'q0' is in group"):
        paired_difference(a, [replace(b[0], group="g")])
    with pytest.raises(InputError, match="at least one score"):
        mean_interval([])
