"""Gains of a search: paired over questions, means over seeds, none where answers do not give a figure."""

import json
import math

import numpy as np
import pytest

from vlmix.core.sample import Score
from vlmix.evals.jackknife import Dealt
from vlmix.evals.report import ANSWERS, REPLICATES, RESULTS, SCHEMA
from vlmix.evals.statistics import paired_difference
from vlmix.search.evidence import Evidence
from vlmix.search.ledger import Entry, Seconds
from vlmix.search.objective import read_objective
from vlmix.search.points import Space
from vlmix.search.settings import StopSettings
from vlmix.search.trial import REPORT, named_figures, open_benchmark

SPACE = Space(("a", "b"))
ONE, BOTH = SPACE.point(["a"]), SPACE.point(["a", "b"])
SYNTH = {"synth_qa": open_benchmark({"kind": "synth_qa"})}


def scores(chance, right):
    return [
        Score(f"q{i}", float(chance.random() < right[i]), "x", ("colour", "shape")[i % 2], f"q{i}")
        for i in range(len(right))
    ]


def write_report(folder, judged, replicates):
    """What a search reads of a report; ``replicates`` are of figures that answers do not give."""
    folder.mkdir(parents=True)
    rows = [
        {"benchmark": "synth_qa", "sample_id": s.sample_id, "task": s.task, "group": s.group,
         "value": s.value, "parsed": s.parsed, "state": s.state, "counted": s.counted,
         "question": "?", "targets": [], "answer": s.parsed, "error": "", "tokens": 1}
        for s in judged
    ]  # fmt: skip
    (folder / ANSWERS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    ends = dict.fromkeys(("value", "low", "high"), 0.5)
    result = {"benchmark": "synth_qa", "n": len(rows), "headline": "accuracy", "figures": {"accuracy": 0.5}}
    result |= {"intervals": {"accuracy": ends}, "settings": {}, "decoding": {}, "versions": {}, "tasks": {}}
    (folder / RESULTS).write_text(json.dumps({"schema": SCHEMA, "results": [result]}))
    if replicates:
        kept = {"schema": SCHEMA, "results": [replicates]}
        (folder / REPLICATES).write_text(json.dumps(kept))


def evidence(folder, answers, formula="synth_qa.accuracy", stop=None, *, spoil=0.0, official=None):
    """``answers`` are those of each point, a list for each seed.

    ``official`` makes further figures of scores, which answers do not give again, and says which have
    replicates.
    """
    found = Evidence(read_objective(formula), stop, folder, SYNTH)
    entries = {}
    for point, runs in answers.items():
        found.keys[point] = tuple(f"{point.label}-{seed}" for seed in range(len(runs)))
        for key, judged in zip(found.keys[point], runs, strict=True):
            figures = named_figures("synth_qa", SYNTH["synth_qa"].summarise(judged), judged)
            figures = {name: value + spoil for name, value in figures.items()}
            replicates = None
            if official:
                rule, kept = official
                dealt = Dealt.deal(judged, 0)
                left = [rule(dealt.without(block)) for block in range(dealt.count)]
                told = {name: [each[name] for each in left] for name in kept}
                replicates = {"blocks": dealt.name, "figures": told}
                figures |= {f"synth_qa.{name}": value for name, value in rule(judged).items()}
            write_report(folder / key / REPORT, judged, replicates)
            cost = {"tokens": 9.0 * len(point.encoders)}
            spent = Seconds(total=1, train=1, judge=1)
            entries[key] = Entry(key=key, figures=figures, cost=cost, seconds=spent)
    found.entries = entries
    return found


def test_an_interval_is_that_of_a_paired_comparison(tmp_path):
    chance = np.random.default_rng(0)
    hard = chance.uniform(0.2, 0.9, 600)
    mine, theirs = scores(chance, np.clip(hard + 0.12, 0, 1)), scores(chance, hard)
    found = evidence(tmp_path, {BOTH: [mine], ONE: [theirs]}, stop=StopSettings(gain=0.02))
    gain, paired = found.gain(BOTH, ONE), paired_difference(mine, theirs)
    assert gain.value == pytest.approx(paired.value)
    assert gain.high - gain.low == pytest.approx(paired.high - paired.low, rel=0.15)
    assert gain.enough
    assert not found.gain(ONE, BOTH).enough
    assert "not more than 0.02" in found.gain(ONE, BOTH).why
    own = found.estimate(BOTH)
    assert own.low < own.value < own.high
    assert own.seeds == (own.value,)


def test_a_small_gain_that_could_be_chance_is_not_enough(tmp_path):
    chance = np.random.default_rng(3)
    theirs = scores(chance, np.full(60, 0.5))
    # Three questions better and one worse of sixty: ahead, and it could be nothing.
    wrong = [i for i, score in enumerate(theirs) if not score.value][:3]
    right = next(i for i, score in enumerate(theirs) if score.value)
    changed = {**dict.fromkeys(wrong, 1.0), right: 0.0}
    mine = [Score(s.sample_id, changed.get(i, s.value), "x", s.task, s.group) for i, s in enumerate(theirs)]
    found = evidence(tmp_path / "one", {BOTH: [mine], ONE: [theirs]}, stop=StopSettings())
    assert found.gain(BOTH, ONE).value > 0
    assert not found.gain(BOTH, ONE).enough
    assert "could be nothing" in found.gain(BOTH, ONE).why
    loose = evidence(tmp_path / "two", {BOTH: [mine], ONE: [theirs]}, stop=StopSettings(interval=False))
    assert loose.gain(BOTH, ONE).enough


def test_seeds_are_averaged_and_costs_come_in(tmp_path):
    chance = np.random.default_rng(1)
    runs = [scores(chance, np.full(100, p)) for p in (0.3, 0.7)]
    found = evidence(
        tmp_path, {ONE: runs}, "mean(synth_qa.tasks.colour, synth_qa.tasks.shape) - cost.tokens / 90"
    )
    seeds = found.estimate(ONE).seeds
    assert found.value(ONE) == pytest.approx(math.fsum(seeds) / 2)
    assert seeds[0] < seeds[1] - 0.2
    assert found.estimate(ONE).low < found.value(ONE) < found.estimate(ONE).high


def product(judged):
    """Two figures as official rules make them: a product of two means, and a mean in percent."""
    means = [np.mean([s.value for s in judged if s.task == task]) for task in ("colour", "shape")]
    return {"both": math.prod(means), "percent": 100 * np.mean([s.value for s in judged])}


def test_official_figures_have_the_interval_of_the_same_formula(tmp_path):
    chance = np.random.default_rng(5)
    levels = {ONE: (0.5, 0.55), BOTH: (0.6, 0.7)}
    answers = {point: [scores(chance, np.full(300, p)) for p in ps] for point, ps in levels.items()}
    formulas = {
        "synth_qa.both": "synth_qa.tasks.colour * synth_qa.tasks.shape",
        "synth_qa.percent": "100 * synth_qa.accuracy",
    }
    for official, ours in formulas.items():
        known = {point: runs[:1] for point, runs in answers.items()}
        told = evidence(tmp_path / official, known, official, official=(product, ["both"])).gain(BOTH, ONE)
        again = evidence(tmp_path / f"{official} again", known, ours).gain(BOTH, ONE)
        assert (told.value, told.low, told.high) == pytest.approx((again.value, again.low, again.high))
        assert told.low < told.value < told.high
    averaged = evidence(tmp_path / "seeds", answers, "synth_qa.both", official=(product, ["both"]))
    assert averaged.gain(BOTH, ONE).low is not None


def test_figures_that_answers_do_not_give_again_have_no_interval(tmp_path):
    chance = np.random.default_rng(2)
    runs = [scores(chance, np.full(50, p)) for p in (0.2, 0.9)]
    found = evidence(tmp_path, {ONE: runs[:1], BOTH: runs[1:]}, stop=StopSettings(), spoil=0.1)
    assert found.estimate(ONE).low is None
    assert found.gain(BOTH, ONE).enough
    assert "no interval" in found.gain(BOTH, ONE).why


def test_a_choice_whose_trial_failed_is_below_all(tmp_path):
    chance = np.random.default_rng(2)
    found = evidence(tmp_path, {ONE: [scores(chance, np.full(20, 0.5))]})
    found.keys[BOTH] = ("gone",)
    assert found.value(BOTH) == -math.inf
    assert not found.gain(BOTH, ONE).enough
    assert not found.stops
