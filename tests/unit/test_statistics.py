"""Intervals: published values, properties, and coverage on data whose truth is known."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmix.core.errors import InputError
from vlmix.core.sample import Judged, Row, Score
from vlmix.evals.jackknife import UNDETERMINED, figure_intervals
from vlmix.evals.statistics import mean_interval, paired_difference, wilson
from vlmix.evals.student import inside, quantile


def scores_of(values, groups=None, prefix="q"):
    groups = groups or [""] * len(values)
    return [
        Score(f"{prefix}{i}", float(v), "", "t", g)
        for i, (v, g) in enumerate(zip(values, groups, strict=True))
    ]


def mean(scores):
    return math.fsum(score.value for score in scores) / len(scores)


def only(formulas, scores, **kwargs):
    """The interval of the one figure there is; a formula that gives None is undefined."""
    ((name, formula),) = formulas.items()

    def summarise(some):
        value = formula(some)
        return {} if value is None else {name: value}

    return figure_intervals(summarise, scores, **kwargs).intervals[name]


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
    assert figure_intervals(lambda s: {"mean": mean(s)}, scores).intervals["mean"].value == found.value
    least = {"least": lambda s: min(x.value for x in s)}
    one, other = (only(least, rows) for rows in (scores, shuffled))
    assert one == other
    assert 0 <= one.low <= one.value <= one.high <= 1
    assert one.low < one.high, "never certain"


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


def test_many_groups_need_no_drawing():
    random = np.random.default_rng(4)
    values = random.integers(0, 4, 9000) / 3
    few, many = (
        mean_interval(scores_of(values[:n], [f"g{i // 2}" for i in range(n)]), resamples=500)
        for n in (7900, 9000)
    )
    assert (few.method, many.method) == ("cluster bootstrap", "linear standard error")
    assert (many.high - many.low) / (few.high - few.low) == pytest.approx(math.sqrt(7900 / 9000), rel=0.05)
    assert many.low < many.value < many.high


def smallest_of_each_group(scores):
    by_group = {}
    for score in scores:
        by_group.setdefault(score.group, []).append(score.value)
    return [min(values) for values in by_group.values()]


def test_a_figure_at_its_end_counts_only_the_groups_it_depends_on():
    scores = scores_of([1] * 60, [f"g{i // 6}" for i in range(60)])
    found = only({"least": lambda s: min([x.value for x in s if x.group < "g3"], default=None)}, scores)
    assert found.low == wilson(1.0, 3).low
    mixed = scores_of([0, 1, 1] * 20, [f"g{i // 3}" for i in range(60)])
    never = only({"never": lambda s: float(np.mean(smallest_of_each_group(s)))}, mixed)
    assert (never.value, never.high) == (0.0, wilson(0.0, 20).high)
    points = {"points": lambda s: 200 * float(np.mean(smallest_of_each_group(s)))}
    assert only(points, scores, units={"points": "points of 200"}).method == UNDETERMINED
    percent = only({"percent": lambda s: 100 * float(np.mean(smallest_of_each_group(s)))}, scores)
    assert percent.method == UNDETERMINED, "100 is no share of 1"
    percent = {"percent": lambda s: 100 * float(np.mean(smallest_of_each_group(s)))}
    found = only(percent, scores, units={"percent": "%"})
    assert (found.low, found.high) == (100 * wilson(1.0, 10).low, 100)


def test_a_mean_over_whole_tasks_is_recognised_and_nothing_else():
    scores = [replace(s, task=f"t{i % 3}") for i, s in enumerate(scores_of([1, 0, 1, 1, 1, 0] * 30))]
    two = [s for s in scores if s.task != "t1"]
    found = only({"two": lambda s: mean([x for x in s if x.task != "t1"] or s)}, scores)
    assert found == mean_interval(two)
    macro = {"macro": lambda s: (mean([x for x in s if x.task == "t0"] or s) + mean(s)) / 2}
    assert only(macro, scores).method == "jackknife, wilson"


def official(scores):
    """As an official rule: it reads rows and judgements, never values; one row is not counted."""
    rows = [(s.row.fields["task"], s.judged.value) for s in scores if s.counted]
    found = {
        task: 100 * float(np.mean([v for t, v in rows if t == task])) for task in sorted({t for t, _ in rows})
    }
    return {"overall": 100 * float(np.mean([v for _, v in rows])), **found}


def test_a_mean_is_recognised_where_a_rule_reads_rows_and_not_values():
    random = np.random.default_rng(3)
    scores = [
        replace(
            s, task=f"t{i % 3}", row=Row(s.sample_id, "", "", {"task": f"t{i % 3}"}), judged=Judged(s.value)
        )
        for i, s in enumerate(scores_of((random.random(300) < 0.7).astype(float)))
    ]
    scores[7] = replace(scores[7], counted=False)
    found = figure_intervals(official, scores, units=dict.fromkeys(["overall", "t0", "t1", "t2"], "%"))
    whole, part = found.intervals["overall"], found.intervals["t1"]
    counted = mean_interval([s for s in scores if s.counted])
    assert (whole.low, whole.high, whole.n) == (100 * counted.low, 100 * counted.high, 299)
    assert part.method == "wilson"
    assert part.n == 99
    assert {*found.replicates} == {"overall", "t0", "t1", "t2"}, "another run may be no mean of values"


def test_figures_in_other_units_and_sums_keep_them():
    random = np.random.default_rng(8)
    scores = scores_of((random.random(400) < 0.25).astype(float), [f"g{i // 2}" for i in range(400)])
    points = {"points": lambda s: 2000 * float(np.mean(smallest_of_each_group(s)))}
    found = only(points, scores, units={"points": "points of 2000"})
    share = float(np.mean(smallest_of_each_group(scores)))
    assert found.method == "jackknife"
    assert found.high - found.value == pytest.approx(
        2000 * 1.98 * math.sqrt(share * (1 - share) / 200), rel=0.25
    )
    total = only({"right": lambda s: math.fsum(x.value for x in s)}, scores, units={"right": "answers"})
    assert total.high - total.value == pytest.approx(1.98 * math.sqrt(400 * 0.25 * 0.75), rel=0.25)
    late = [replace(s, task="rare" if s.sample_id in {"q0", "q1"} else "t") for s in scores]
    rare = only({"rare": lambda s: 1.0 if any(x.task == "rare" for x in s) else None}, late)
    assert rare.low == wilson(1.0, 1).low, "one group holds all of the rare task"


def f1(scores):
    hit, false, missed = (sum(s.parsed == kind for s in scores) for kind in ("hit", "false", "missed"))
    return 2 * hit / max(2 * hit + false + missed, 1)


@pytest.mark.parametrize("kind", ["consistency", "f1"])
def test_the_truth_lies_inside_about_95_times_in_100_for_figures_that_are_no_means(kind):
    groups, random, inside_ = 40, np.random.default_rng(40), 0
    truth = {"consistency": 0.7 * 0.8**2 + 0.3 * 0.99**2, "f1": 2 * 0.8 / (2 * 0.8 + 0.2 + 0.2)}[kind]
    formula = {"consistency": lambda s: float(np.mean(smallest_of_each_group(s))), "f1": f1}[kind]
    for trial in range(120):
        rates = np.where(random.random(groups) < 0.3, 0.99, 0.8)
        values = (random.random((groups, 2)) < rates[:, None]).astype(float).ravel()
        names = random.choice(["hit", "missed", "false", "none"], 2 * groups, p=[0.4, 0.1, 0.1, 0.4])
        rows = scores_of(values, [f"g{i // 2}" for i in range(2 * groups)])
        rows = [replace(s, parsed=str(name)) for s, name in zip(rows, names, strict=True)]
        found = only({kind: formula}, rows, seed=trial)
        inside_ += found.low <= truth <= found.high
    assert 0.91 <= inside_ / 120 <= 0.99


def test_students_t_is_that_of_the_tables():
    assert [round(quantile(0.95, n), 3) for n in (1, 2, 10, 39, 99)] == [12.706, 4.303, 2.228, 2.023, 1.984]
    assert round(inside(3.169, 10), 3) == 0.99


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
