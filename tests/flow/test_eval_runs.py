"""``vlmix eval`` gives the same bytes for any batch, order, number of processes and number of kills."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.eval_runs import MOMENTS, SIDE, SIZE, model_and_processor
from vlmix.core.interfaces import Router
from vlmix.core.sample import Answer, Decoding, ImageRef, Sample, Turn
from vlmix.core.tensors import Routing
from vlmix.evals import ties
from vlmix.evals.benchmarks.synth_qa import SynthQa, SynthQaSettings
from vlmix.evals.choosing import option_nats
from vlmix.evals.controls import question_of
from vlmix.evals.report import write_report
from vlmix.evals.responder import CannedResponder, ModelResponder
from vlmix.evals.run import evaluate
from vlmix.evals.store import AnswerStore, StoredResponder, model_digest

pytestmark = pytest.mark.flow
FILES = ("results.json", "answers.jsonl")


@pytest.fixture(scope="module")
def benchmark():
    return SynthQa(SynthQaSettings(size=SIZE, image_size=SIDE))


@pytest.fixture(scope="module")
def small():
    return model_and_processor()


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attacked")
    command = [sys.executable, "-m", "tests.eval_runs", str(folder)]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_run_killed_twenty_times_leaves_the_bytes_of_one_that_was_not(attacked):
    killed, whole = attacked["killed"], attacked["whole"]
    assert killed["codes"] == [-9] * (len(killed["codes"]) - 1) + [0]
    assert len(killed["codes"]) >= 20 + 2
    assert len(MOMENTS) == 3
    assert killed["between"] == ["run.lock", "unfinished"]
    assert killed["files"] == whole
    assert "asked 0 questions" in killed["told"]
    assert f"{2 * SIZE} answers were there from before" in killed["told"]
    assert killed["left"] == ["report", "report-0.txt"], "a killed publication left something behind"


def test_two_processes_and_other_batches_leave_the_same_bytes(attacked):
    assert attacked["together"] == attacked["eight"] == attacked["whole"]
    assert attacked["left"] == ["answers.jsonl", "report.html", "results.json", "timing.json"]
    assert set(attacked["codes"]) == {0}
    answers = [json.loads(line)["answer"] for line in attacked["whole"]["answers.jsonl"].splitlines()]
    assert len(set(answers)) > SIZE / 4, "the answers must differ for this test to see anything"


def test_a_folder_in_use_is_refused(attacked):
    assert attacked["refused"]["code"] == 5
    assert "is in use by process" in attacked["refused"]["told"]


class Shuffled:
    """Asks in another order, and gives the answers back in the one that was asked for."""

    def __init__(self, responder, seed):
        self.responder, self.seed = responder, seed

    def respond(self, samples, decoding):
        rows = list(samples)
        order = random.Random(self.seed).sample(range(len(rows)), len(rows))
        found = dict(
            zip(order, self.responder.respond([rows[place] for place in order], decoding), strict=True)
        )
        return (found[place] for place in range(len(rows)))


def test_ten_reports_of_any_batch_and_order_are_the_same_bytes(benchmark, small, tmp_path):
    found = set()
    for number in range(10):
        responder = Shuffled(ModelResponder(*small), number) if number % 2 else ModelResponder(*small)
        size = (1, 4, 8, 64, 3)[number % 5]
        result = evaluate(responder, benchmark, Decoding(max_new_tokens=3, batch_size=size), limit=12)
        write_report(tmp_path / str(number), "the same", [result], gallery=1)
        found.add(tuple((tmp_path / str(number) / name).read_bytes() for name in FILES))
    assert len(found) == 1


def texts(responder, samples, batch_size, **how):
    decoding = Decoding(max_new_tokens=6, batch_size=batch_size, **how)
    return [answer.text for answer in responder.respond(samples, decoding)]


def test_answers_chosen_by_a_hair_are_asked_again_alone(benchmark, small, monkeypatch):
    responder, asked = ModelResponder(*small), []
    real = responder._generate
    samples = [question_of(sample) for sample in benchmark.samples()]
    alone = texts(responder, samples, 1)
    monkeypatch.setitem(ties._SHARE, torch.float32, 0.02)
    monkeypatch.setattr(responder, "_generate", lambda rows, how: asked.append(len(rows)) or real(rows, how))
    assert texts(responder, samples, SIZE) == alone
    assert asked[0] == SIZE
    assert 0 < len(asked[1:]) < SIZE, "some and not all are asked again"
    assert set(asked[1:]) == {1}


def test_scores_in_bfloat16_are_coarse_and_answers_still_do_not_depend_on_the_batch(benchmark):
    responder = ModelResponder(*model_and_processor(dtype=torch.bfloat16))
    samples = [question_of(sample) for sample in benchmark.samples()]
    assert texts(responder, samples, 1) == texts(responder, samples, SIZE)


def test_experts_chosen_by_a_hair_are_noticed_in_the_row_they_were_chosen_for(small):
    logits = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 1.0], [1.0, 1.0, 0.0], [0.0, 2.0, 1.0]])
    chosen = torch.tensor([[0], [0], [0], [2]])
    routing = Routing((2, 2), logits, logits.softmax(-1), chosen, torch.ones(4, 1))
    watch = ties.Ties(small[0], 2, [3])
    assert watch._chosen_by_a_hair(routing).tolist() == [[False, False], [True, True]]
    said = SimpleNamespace(routing=(routing,))
    mask = torch.ones(2, 2)
    watch._saw(None, None, {"input_ids": torch.zeros(2, 2), "attention_mask": mask}, said)
    assert watch.close.tolist() == [False, True]
    hidden = ties.Ties(small[0], 2, [3])
    mask[1] = 0
    hidden._saw(None, None, {"input_ids": torch.zeros(2, 2), "attention_mask": mask}, said)
    assert hidden.close.tolist() == [False, False], "padding decides nothing"


def test_drawn_answers_and_beams_do_not_depend_on_the_batch(benchmark, small):
    samples = [question_of(sample) for sample in benchmark.samples()[:6]]
    responder = ModelResponder(*small)
    assert texts(responder, samples, 1, temperature=1.0) == texts(responder, samples, 4, temperature=1.0)
    assert texts(responder, samples, 1, beams=2) == texts(responder, samples, 4, beams=2)


def test_rows_that_compete_for_experts_are_asked_one_at_a_time(benchmark, small):
    class Competing(Router):
        rowwise = False

        @classmethod
        def plan(cls, settings, experts):
            pass

        def forward(self, x_BTD):
            return x_BTD

    model, _ = small
    assert not ties.stands_alone(model)
    model.competing = Competing()
    try:
        assert ties.stands_alone(model)
        samples = [question_of(sample) for sample in benchmark.samples()[:6]]
        assert texts(ModelResponder(*small), samples, 1) == texts(ModelResponder(*small), samples, 6)
    finally:
        del model.competing


def test_the_likeliest_option_is_chosen_and_never_depends_on_what_else_is_asked(benchmark, small):
    options = ("yes", "no", "seven circles and a square")
    samples = [replace(question_of(sample), options=options) for sample in benchmark.samples()]
    responder = ModelResponder(*small)
    whole = texts(responder, samples, 1, choose="likelihood")
    mean = texts(responder, samples, 8, choose="mean_likelihood")
    assert texts(responder, samples[::-1], 8, choose="likelihood") == whole[::-1]
    assert set(whole) <= set(options)
    assert whole != mean, "the longest option is the least likely as a whole"
    assert texts(responder, samples, 8) == texts(responder, [replace(s, options=()) for s in samples], 8)
    nats = option_nats(*small, samples[0], 128)
    assert whole[0] == options[min(range(3), key=lambda place: nats[place][0])]
    alone = [option_nats(*small, replace(samples[0], options=(each,)), 128)[0] for each in options]
    for (found, tokens), (expected, same) in zip(nats, alone, strict=True):
        assert (found, tokens) == (pytest.approx(expected, rel=1e-5), same)
    before = (*samples[0].turns, Turn("assistant", ("yes",)), *samples[0].turns[:1])
    history = replace(samples[0], turns=(*before[:-1], Turn("user", ("and now?",))), options=("yes",))
    assert option_nats(*small, history, 128)[0][1] == nats[0][1], "what was said before is not judged"
    broken = replace(samples[0], turns=(Turn("user", ("word " * 300,)),))
    answer = next(iter(responder.respond([broken], Decoding(choose="likelihood"))))
    assert answer.error


def stored(responder, folder, kept=lambda *_: None, **basis):
    return StoredResponder(responder, AnswerStore(folder), basis, kept, lambda _: None)


class Counting:
    """Says what it was asked, and counts it."""

    def __init__(self, failing=()):
        self.asked, self.failing = [], failing

    def respond(self, samples, decoding):
        for sample in samples:
            self.asked.append(sample.id)
            error = "no" if sample.id in self.failing else ""
            yield Answer(sample.id, "" if error else f"to {sample.id}", error=error)


def test_kept_answers_are_those_of_the_same_question_model_and_decoding(benchmark, tmp_path):
    samples = [question_of(sample) for sample in benchmark.samples()[:4]]
    first, told = Counting(failing=(samples[3].id,)), []
    list(stored(first, tmp_path, model="a").respond(samples, Decoding()))
    again = Counting()
    found = list(
        stored(again, tmp_path, lambda *row: told.append(row), model="a").respond(samples, Decoding())
    )
    assert [answer.text for answer in found] == [f"to {sample.id}" for sample in samples]
    assert again.asked == [samples[3].id], "an answer that failed is asked for again"
    assert told == [(3, 4)]

    def asked_again(rows, decoding=None, model="a"):
        counting = Counting()
        list(stored(counting, tmp_path, model=model).respond(rows, decoding or Decoding()))
        return len(counting.asked)

    assert asked_again(samples) == 0
    assert asked_again(samples[::-1], Decoding(batch_size=1)) == 0
    assert asked_again(samples, Decoding(max_new_tokens=7)) == 4
    assert asked_again(samples, model="b") == 4
    other = [replace(sample, turns=(Turn("user", (*sample.images, "else?")),)) for sample in samples]
    assert asked_again(other) == 4
    pictures = [replace(samples[0], turns=samples[1].turns)]
    assert asked_again(pictures) == 1
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    store = AnswerStore(tmp_path)
    store.add({"key": 1})
    lines = path.read_bytes().splitlines()
    assert lines[:-1] == content.splitlines()[:-1], "a line that was cut short is gone"
    assert AnswerStore(tmp_path).get("key") == 1


def test_a_changed_model_has_another_digest(small, tmp_path):
    small[0].save_pretrained(tmp_path)
    before = model_digest(tmp_path)
    assert model_digest(tmp_path) == before
    with (tmp_path / "config.json").open("a") as file:
        file.write(" ")
    assert model_digest(tmp_path) != before


def test_likelihoods_are_the_same_bits_in_any_order_and_are_kept(small, tmp_path):
    pairs = [("the circle is ", "red " * (1 + number % 5)) for number in range(30)]
    responder = ModelResponder(*small)
    whole = list(responder.likelihoods(pairs))
    assert list(responder.likelihoods(pairs[::-1]))[::-1] == whole
    assert list(stored(responder, tmp_path).likelihoods(pairs)) == whole
    assert list(stored(CannedResponder({}), tmp_path).likelihoods(pairs)) == whole


def test_a_picture_that_is_gone_is_an_error_and_nothing_is_kept(small, benchmark, tmp_path):
    sample = question_of(benchmark.samples()[0])
    gone = Sample("gone", (Turn("user", (ImageRef(tmp_path / "gone.png"), "what?")),))
    found = list(stored(ModelResponder(*small), tmp_path / "kept").respond([sample, gone], Decoding(4)))
    assert [bool(answer.error) for answer in found] == [False, True]
    assert "gone.png" in found[1].error
    assert len((tmp_path / "kept" / "answers-0.jsonl").read_text().splitlines()) == 1
