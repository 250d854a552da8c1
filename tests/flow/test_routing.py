"""From a trained mixture to the page that shows what its experts do: counted once, drawn, and judged."""

import json
import re

import pytest
import torch
from typer.testing import CliRunner

from tests.runs import LANGUAGE, recipe, stage, synth, train
from vlmix.cli.flow import open_benchmark
from vlmix.cli.main import app
from vlmix.core.errors import InputError
from vlmix.core.sample import Decoding
from vlmix.evals.controls import question_of
from vlmix.evals.report import write_report
from vlmix.evals.responder import ModelResponder
from vlmix.evals.routing import routing_report
from vlmix.evals.run import evaluate
from vlmix.evals.window import RoutingWindow
from vlmix.models.loading import load
from vlmix.models.processing import VlmixProcessor
from vlmix.moe.recorder import RoutingRecorder
from vlmix.train.records import read_metrics

pytestmark = pytest.mark.flow
CLIP = {"kind": "clip", "image_size": 48, "patch_size": 16, "width": 16, "layers": 2, "heads": 2, "mlp": 16}
CLIP["feature_layer"] = -1
EYES = {"place": "encoders.0", "layers": "all", "count": 3, "router": {"kind": "topk", "k": 1}}
WORDS = {"layers": "all", "count": 4, "balance": {"switch": 0.1}}
QUESTIONS, LONGEST = 24, 5


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A dense stage, then one with experts in eye and decoder."""
    out = tmp_path_factory.mktemp("mixed") / "run"
    before = [{"kind": "upcycle", "experts": EYES}, {"kind": "upcycle", "experts": WORDS}]
    model = {
        "image_size": 48,
        "encoders": [CLIP],
        "fusion": {"kind": "single"},
        "projector": {"kind": "linear"},
        "language_model": {**LANGUAGE, "tie_word_embeddings": False, "num_hidden_layers": 3},
        "tokenizer": {"train": {"vocab_size": 300, "samples": 20}},
        "chat_template": "chatml",
        "max_length": 128,
    }
    stages = [
        stage("dense", {"*": 1e-2}, synth("colour", "count")),
        stage("sparse", {"*": 1e-2}, synth("colour", "count"), before=before, micro_batch_size=2, steps=12),
    ]
    train(recipe(model=model, stages=stages), out)
    return out


@pytest.fixture
def talkative(mixed, monkeypatch):
    """The model, its answers as varied in words and length as its questions: every fifth token ends one."""
    monkeypatch.setattr(VlmixProcessor, "stop_token_ids", list(range(0, 300, 5)))
    model, processor = load(mixed)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.5)
    return model, processor


def watched(model, processor, batch_size):
    raw = {"kind": "synth_qa", "size": QUESTIONS, "image_size": 48, "tasks": ["colour", "count"]}
    window, decoding = (
        RoutingWindow(model, processor),
        Decoding(batch_size=batch_size, max_new_tokens=LONGEST),
    )
    result = evaluate(window.watch(ModelResponder(model, processor)), open_benchmark(raw), decoding)
    assert result.blind is not None, "the control is asked too, and not counted"
    return result, routing_report(window, result.samples)


def test_every_token_of_question_and_answer_counts_once_whatever_the_batch(talkative, tmp_path):
    model, processor = talkative
    (result, seen), (_, alone) = watched(model, processor, 4), watched(model, processor, 1)
    prompts = [processor.encode(question_of(s), supervise=False).input_ids for s in result.samples]
    visual = sum(token == model.config.image_token_id for ids in prompts for token in ids)
    # The last of the most tokens that an answer may have is never read; nor is the end of a shorter one.
    spoken = sum(min(answer.tokens, LONGEST - 1) for answer in result.model.answers)
    assert len({answer.tokens for answer in result.model.answers}) > 1, "answers must end at different times"
    words = [seen.seen.tallies[note.name] for note in seen.seen.mixtures()[1]]
    assert len(words) == 3
    for tally in words:
        assert tally.tokens.tolist() == [visual, sum(map(len, prompts)) - visual + spoken, 0]
        assert tally.choices.sum(1).tolist() == (2 * tally.tokens).tolist()
    for note in seen.seen.mixtures()[0]:
        assert seen.seen.tallies[note.name].tokens.tolist() == [QUESTIONS * 10, 0, 0], (
            "patches and class token"
        )
    one, other = seen.to_json(), alone.to_json()
    assert one["paths"] == other["paths"]
    assert one["sets"] == other["sets"]
    for layer, same in zip(one["layers"], other["layers"], strict=True):
        for name in ("tokens", "choices", "first", "dropped", "unserved", "together"):
            assert layer[name] == same[name]
        # Sums of float32 products whose order depends on the batch.
        for name in ("weights", "shares"):
            assert layer[name] == [pytest.approx(row, rel=1e-4) for row in same[name]]
    assert [layer["state"] for layer in one["verdict"]["layers"]] == [
        layer["state"] for layer in other["verdict"]["layers"]
    ]
    page = write_report(tmp_path / "report", "t", [result], routing=seen).read_text()
    again = json.loads((tmp_path / "report" / "routing.json").read_text())
    assert RoutingRecorder.from_json(again).to_json() == seen.seen.to_json()
    assert seen.verdict.sentence in page
    assert page.count('class="load-bar"') == 2 + 2 * 3
    assert "Most frequent paths: language_model" in page
    # Three examples; of the eye's two layers both, of the decoder's three the first, middle and last.
    assert page.count('class="overlay"') == 3 * (2 + 3)
    drawn = re.findall(r'<svg class="overlay".*?</svg>', page, flags=re.DOTALL)
    assert {len(re.findall(r"M[\d.]+ [\d.]+h", picture)) for picture in drawn} == {9}, "every patch once"
    assert "An expert's number is only its place" in page


def test_an_example_is_drawn_over_the_picture_it_was_asked_about(talkative):
    """Two benchmarks of one kind give their questions the same names."""
    model, processor = talkative
    first, second = (
        open_benchmark({"kind": "synth_qa", "size": 2, "image_size": 48, "tasks": [task]}).samples()
        for task in ("colour", "count")
    )
    assert first[0].id == second[0].id
    window = RoutingWindow(model, processor)
    kept = window.show([*first, *second])
    assert [sample.id for sample in kept] == list(window.recorder.examples)


def test_the_command_shows_the_verdict_and_writes_it_down(mixed, tmp_path):
    arguments = ["eval", mixed, "-b", "synth_qa", "--limit", 6, "--set", "image_size=48", "--routing"]
    found = CliRunner().invoke(app, [*map(str, arguments), "--out", str(tmp_path / "report")])
    assert found.exit_code == 0, found.output
    verdict = json.loads((tmp_path / "report" / "routing.json").read_text())["verdict"]
    assert f"experts  {verdict['sentence']}" in found.output
    assert verdict["rules"] in found.output
    assert verdict["thresholds"].keys() == {"unused", "uneven", "collapsed", "enough"}
    assert verdict["sentence"] in (tmp_path / "report" / "report.html").read_text()


def test_without_experts_there_is_nothing_to_watch_and_without_the_option_nothing_watches(
    whole, mixed, tmp_path
):
    with pytest.raises(InputError, match="has no experts, so nothing is routed"):
        RoutingWindow(*load(whole[0]))
    arguments = ["eval", mixed, "-b", "synth_qa", "--limit", 4, "--set", "image_size=48"]
    found = CliRunner().invoke(app, [*map(str, arguments), "--out", str(tmp_path / "report")])
    assert found.exit_code == 0, found.output
    assert not (tmp_path / "report" / "routing.json").exists()
    assert "experts  " not in found.output
    assert "Experts" not in (tmp_path / "report" / "report.html").read_text().partition("<body>")[2]


def test_training_writes_down_how_its_experts_fare(mixed):
    rows = read_metrics(mixed / "metrics.jsonl")
    dense, sparse = ([row for row in rows if row["stage"] == name] for name in ("dense", "sparse"))
    assert all("balance" not in row and "experts" not in row for row in dense)
    assert all(0.1 <= row["balance"] < 0.4 < row["loss"] for row in sparse), (
        "0.1 is 0.1 times perfect balance"
    )
    assert [row["step"] for row in sparse if "experts" in row] == [10, 12]
    assert all("language_model" in layer or "encoders.0" in layer for layer in sparse[-1]["experts"])
    for figures in sparse[-1]["experts"].values():
        assert 0.25 <= figures["most"] <= 1
        assert 1 <= figures["effective"] <= 4
