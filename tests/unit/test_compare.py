"""Two runs on the same questions: exact tests, corrections, who is ahead, and what is refused."""

import math
import random
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmix.core.errors import InputError
from vlmix.core.sample import Score
from vlmix.evals.comparison import compare_runs
from vlmix.evals.paired import difference, holm, mcnemar, sign_flip
from vlmix.evals.pareto import Priced, frontier, pareto_picture
from vlmix.evals.past_runs import PastAnswer, PastResult, PastRun


def test_mcnemar_is_the_binomial_test_of_the_questions_that_differ():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(6, 0) == pytest.approx(2 / 2**6)
    # Agresti 2002 (Categorical Data Analysis), section 10.1: 86 against 150 approvals that changed
    assert mcnemar(86, 150) == pytest.approx(3.7e-5, rel=0.05)
    for n in range(1, 12):
        for k in range(n + 1):
            tail = sum(math.comb(n, i) for i in range(min(k, n - k) + 1)) / 2**n
            assert mcnemar(k, n - k) == pytest.approx(min(1.0, 2 * tail))
    with pytest.raises(InputError, match="negative"):
        mcnemar(-1, 2)


@given(st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0]), max_size=11))
def test_few_signs_are_turned_in_all_ways(gaps):
    p, _ = sign_flip(gaps)
    ways = [
        abs(sum(s * g for s, g in zip(signs, gaps, strict=True)))
        for signs in product((-1, 1), repeat=len(gaps))
    ]
    assert p == pytest.approx(sum(way >= abs(sum(gaps)) - 1e-9 for way in ways) / len(ways))


def test_drawn_signs_and_the_normal_limit_agree_with_the_exact_test():
    for wins, losses in ((30, 14), (24, 20)):
        p, test = sign_flip([1.0] * wins + [-1.0] * losses)
        assert "draws" in test
        assert p == pytest.approx(mcnemar(wins, losses), abs=0.012)
    p, test = sign_flip([1.0] * 1050 + [-1.0] * 950)
    assert "normal" in test
    assert p == pytest.approx(mcnemar(1050, 950), rel=0.08)
    assert sign_flip([0.0, 0.0]) == (1.0, "nothing differs")


@given(st.lists(st.floats(0, 1), max_size=9))
def test_holm_keeps_the_order_and_never_lowers_a_chance(chances):
    found = holm(chances)
    assert all(p <= q <= 1 for p, q in zip(chances, found, strict=True))
    pairs = sorted(zip(chances, found, strict=True))
    assert [q for _, q in pairs] == sorted(found)
    if chances:
        assert found[chances.index(min(chances))] == pytest.approx(min(1.0, len(chances) * min(chances)))


def test_equal_systems_are_called_different_at_most_in_five_of_a_hundred_tries():
    rng = random.Random(1)
    chances = [sign_flip([rng.random() - rng.random() for _ in range(10)])[0] for _ in range(400)]
    assert 0.025 <= sum(p < 0.05 for p in chances) / 400 <= 0.075


def test_a_difference_counts_wins_and_takes_the_test_that_fits():
    a, b = (
        [Score(f"q{i}", v, "", "t") for i, v in enumerate(values)]
        for values in ([1, 1, 0, 1.0], [0, 1, 1, 0.0])
    )
    found = difference(a, b)
    assert (found.wins, found.losses, found.ties, found.test) == (2, 1, 1, "McNemar's exact test")
    assert found.interval.value == pytest.approx(0.25)
    graded = difference(a, [replace(score, value=score.value / 2) for score in a])
    assert (graded.wins, graded.test) == (3, "exact sign-flip test")
    grouped = [[replace(score, group=f"g{i // 2}") for i, score in enumerate(each)] for each in (a, b)]
    assert difference(*grouped).test == "exact sign-flip test", "two answers on one picture are not two coins"


def run_of(name, values, *, headline="accuracy", figure=None, groups=None, method="wilson", **changes):
    """A judged run whose answers have these values; ``changes`` are of its entry or its result."""
    mean = sum(values) / len(values)
    figure = mean if figure is None else figure
    entry = {
        "benchmark": "toy",
        "headline": headline,
        "figures": {headline: figure},
        "intervals": {headline: {"value": figure, "low": figure, "high": figure, "method": method}},
        "settings": {"kind": "toy", "path": name},
        "decoding": {"max_new_tokens": 8},
        "versions": {"torch": "1"},
    }
    entry |= {key: changes.pop(key) for key in list(changes) if key in entry or key in {"units", "protocol"}}
    answers = {
        f"q{i}": PastAnswer(
            Score(f"q{i}", float(value), "", f"t{i % 2}", (groups or {}).get(i, "")),
            f"what {i}?",
            ("x",),
            "x",
            "",
            1,
        )
        for i, value in enumerate(values)
    }
    result = PastResult(entry, answers, changes.pop("replicates", {}), changes.pop("blocks", "b"), {})
    return PastRun(name, {"toy": replace(result, **changes)})


def test_a_clear_lead_is_told_and_an_unclear_one_is_not():
    a, b = run_of("a", [0, 0, 0, 1] * 25), run_of("b", [1, 0, 0, 1] * 25)
    (found,) = compare_runs([a, b]).contests
    assert (found.state, found.questions.wins, found.questions.losses, found.questions.ties) == (
        "ahead",
        25,
        0,
        75,
    )
    assert found.verdict.startswith("b is ahead of a by 25.0 points [1")
    (back,) = compare_runs([b, a]).contests
    assert back.state == "behind"
    assert back.verdict.startswith("b is ahead of a by 25.0 points [1"), (
        "the winner is named first, either way"
    )
    (close,) = compare_runs([a, run_of("c", [0, 0, 0, 1] * 24 + [1, 1, 0, 0])]).contests
    assert close.state == "undecided"
    assert close.verdict.startswith("undecided: c minus a is 1.0 points [")
    assert [close.tasks[task].wins for task in ("t0", "t1")] == [1, 1]


def test_many_comparisons_are_corrected_for():
    rng = random.Random(3)
    base = [float(rng.random() < 0.5) for _ in range(100)]
    better = [1.0 if i % 9 == 0 else value for i, value in enumerate(base)]
    runs = [run_of("base", base), run_of("better", better), *(run_of(f"r{i}", base) for i in range(6))]
    (alone,) = compare_runs(runs[:2]).contests
    assert alone.state == "ahead"
    against_base = compare_runs(runs, "base")
    assert len(against_base.contests) == 7
    found = against_base.contests[0]
    assert found.adjusted == pytest.approx(min(1, 7 * found.p))
    assert "Holm's correction for 7 comparisons" in found.verdict
    assert len(compare_runs(runs).contests) == 28
    with pytest.raises(InputError, match="baseline x is none of the runs"):
        compare_runs(runs, "x")


def test_a_headline_that_is_no_mean_is_paired_by_its_replicates():
    values = [1, 0, 1, 1] * 10
    near = [0.8 + 0.01 * (i % 3) for i in range(20)]
    kind = {"headline": "F1", "method": "jackknife, wilson"}
    a = run_of("a", values, figure=0.8, replicates={"F1": near}, **kind)
    b = run_of(
        "b",
        values,
        figure=0.86,
        replicates={"F1": [x + 0.06 + 0.001 * (i % 2) for i, x in enumerate(near)]},
        **kind,
    )
    (found,) = compare_runs([a, b]).contests
    assert found.figure is not None
    assert (found.figure.method, found.state) == ("paired jackknife", "ahead")
    assert found.verdict.startswith("b is ahead of a by 6.0 points")
    for other in (replace(b.results["toy"], blocks="other"), replace(b.results["toy"], replicates={})):
        (found,) = compare_runs([a, PastRun("b", {"toy": other})]).contests
        assert found.figure is None
        assert found.state == "undecided"
        assert any("F1 cannot be paired" in remark for remark in found.remarks)
    points = {**kind, "units": {"F1": "points of 200"}}
    a = run_of("a", values, figure=160, replicates={"F1": [200 * x for x in near]}, **points)
    b = run_of(
        "b",
        values,
        figure=170,
        replicates={"F1": [200 * x + 10 + i % 2 for i, x in enumerate(near)]},
        **points,
    )
    assert "by 10.000 points of 200 [" in compare_runs([a, b]).contests[0].verdict


def test_what_differs_is_told_or_refused():
    a, values = run_of("a", [1, 0] * 20), [1, 1] * 20
    told = compare_runs(
        [
            a,
            run_of(
                "b",
                values[:30],
                decoding={"max_new_tokens": 9},
                versions={"torch": "2"},
                settings={"kind": "toy", "size": 3},
            ),
        ]
    ).contests[0]
    words = " ".join(told.remarks)
    assert "10 of 40 questions of a are not in the other run" in words
    assert "max_new_tokens 8 against 9" in words
    assert "torch 1 against 2" in words
    assert "size None against 3" in words
    assert "path" not in words
    assert told.questions.interval.n == 30
    other = a.results["toy"]
    strange = {key: replace(each, question="another?") for key, each in other.answers.items()}
    for result, reason in (
        (
            replace(other, entry={**other.entry, "protocol": {"name": "p", "source": "s"}}),
            "scored by no named",
        ),
        (replace(other, answers=strange), "40 of 40 ids stand for different questions"),
        (
            replace(other, answers={f"z{key}": each for key, each in other.answers.items()}),
            "no question in common",
        ),
        (replace(other, entry={**other.entry, "headline": "F1"}), "the headline of one is accuracy"),
    ):
        with pytest.raises(InputError, match=reason):
            compare_runs([a, PastRun("b", {"toy": result})])
    with pytest.raises(InputError, match="different benchmarks"):
        compare_runs([a, PastRun("b", {"other": other})])
    with pytest.raises(InputError, match="at least two"):
        compare_runs([a])


def test_the_frontier_holds_those_no_other_beats():
    runs = [
        Priced(*each, 0, 1)
        for each in (("dear", 9, 0.7), ("best", 9, 0.8), ("cheap", 1, 0.5), ("worse", 2, 0.4))
    ]
    runs += [Priced("failed", 0.1, -math.inf, None, None), Priced("unpriced", math.nan, 0.9, None, None)]
    assert [run.name for run in frontier(runs)] == ["cheap", "best"]
    assert pareto_picture("$x", runs, "GFLOP", "accuracy").startswith(b"\x89PNG")
