"""What every registered benchmark owes, run on each without naming any."""

import random

import pytest

from vlmix.core.errors import RecipeError
from vlmix.core.parts import BENCHMARKS, read_part
from vlmix.core.sample import Answer
from vlmix.evals.controls import question_of, targets_of
from vlmix.evals.jackknife import UNDETERMINED
from vlmix.evals.responder import CannedResponder
from vlmix.evals.run import evaluate


@pytest.fixture(params=[name for name in BENCHMARKS.names() if BENCHMARKS.get(name).canned])
def benchmark(request, tmp_path):
    return BENCHMARKS.get(request.param).tiny(tmp_path)


BEST = {"": 1.0, "%": 100.0}
"""What a figure in a unit is at best, where the unit says it."""


def judged(benchmark, texts):
    return evaluate(CannedResponder(texts), benchmark, blind=False)


def perfect(benchmark):
    return {sample.id: targets_of(sample)[0] for sample in benchmark.samples()}


def test_samples_are_the_same_on_every_call_and_can_be_asked(benchmark):
    first, again = list(benchmark.samples()), list(benchmark.samples())
    assert len(first) > 1
    assert [(s.id, s.turns[-1].text, s.target, s.task, s.group) for s in first] == [
        (s.id, s.turns[-1].text, s.target, s.task, s.group) for s in again
    ]
    assert len({sample.id for sample in first}) == len(first), "two samples share an id"
    for sample, other in zip(first, again, strict=True):
        assert targets_of(sample), f"{sample.id} has no target"
        assert [image.open().tobytes() for image in sample.images] == [
            i.open().tobytes() for i in other.images
        ]
        asked = question_of(sample)
        assert asked.turns[-1].role == "user"
        assert asked.turns[-1].text.strip()
        assert (asked.target, dict(asked.meta)) == (None, {})


def test_perfect_answers_score_one_in_any_accepted_wording(benchmark):
    for place in (0, -1):
        texts = {sample.id: targets_of(sample)[place] for sample in benchmark.samples()}
        result = judged(benchmark, texts)
        best = result.model.figures[benchmark.headline]
        assert {score.value for score in result.model.scores if score.counted} == {1.0}
        assert best == BEST.get(benchmark.unit(benchmark.headline), best) > 0
        interval = result.model.intervals[benchmark.headline]
        assert interval.low < best or interval.method == UNDETERMINED, "certain after a few questions"


def most(benchmark):
    """Right answers to all questions but those of the last group."""
    samples = benchmark.samples()
    last = samples[-1].group or samples[-1].id
    return {s.id: targets_of(s)[0] for s in samples if (s.group or s.id) != last}


@pytest.mark.parametrize("texts", [True, False], ids=["empty", "missing"])
def test_empty_and_failed_answers_score_zero_and_stay_in_the_denominator(benchmark, texts):
    answers = {sample.id: "" for sample in benchmark.samples()} if texts else {}
    result = judged(benchmark, answers)
    half, best = judged(benchmark, most(benchmark)), judged(benchmark, perfect(benchmark))
    if texts and all(score.parsed for score in result.model.scores):  # POPE reads no text as a yes
        assert result.model.figures[benchmark.headline] < best.model.figures[benchmark.headline]
    else:
        assert result.model.figures[benchmark.headline] == 0.0
    assert result.model.failed == (0 if texts else len(result.samples))
    counted = sum(score.counted for score in result.model.scores)
    assert sum(task.n for task in result.model.tasks.values()) == counted
    assert 0 < half.model.figures[benchmark.headline] < best.model.figures[benchmark.headline]


def test_an_error_scores_zero_whatever_text_stands_beside_it(benchmark):
    for sample in benchmark.samples():
        assert benchmark.score(sample, Answer(sample.id, targets_of(sample)[0], error="broken")).value == 0


def test_shares_lie_in_0_to_1_and_figures_forget_the_order(benchmark):
    rng, texts = random.Random(3), perfect(benchmark)
    wrong = {key: text if rng.random() < 0.5 else "wrong" for key, text in texts.items()}
    result = judged(benchmark, wrong)
    assert benchmark.headline in result.model.figures
    shares = [value for name, value in result.model.figures.items() if name not in result.units]
    assert all(0 <= value <= 1 for value in shares)
    assert all(0 <= score.value <= 1 for score in result.model.scores)
    for _ in range(3):
        shuffled = rng.sample(result.model.scores, len(result.model.scores))
        assert benchmark.summarise(shuffled) == pytest.approx(dict(result.model.figures), abs=1e-9)


def test_settings_come_back_from_json_and_refuse_strangers(benchmark):
    raw = benchmark.settings.model_dump(mode="json")
    assert raw["kind"] in BENCHMARKS.names()
    assert read_part(BENCHMARKS, raw) == benchmark.settings
    with pytest.raises(RecipeError, match="unknown key"):
        read_part(BENCHMARKS, {**raw, "no_such_key": 1})
