"""Results of solo stages: computed once, taken by every mixture that asks for the same, never by another."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file

from tests.flow.test_resume import stop_after
from tests.runs import CONVNEXT, TINY, digest, recipe, stage, synth, told, train
from vlmix.core.errors import CheckpointError, InterruptedRunError
from vlmix.train.aligned import Start, give, take
from vlmix.train.build import build
from vlmix.train.parallel.processes import Processes
from vlmix.train.solo import running

pytestmark = pytest.mark.flow

SIGLIP = TINY["model"]["encoders"][0]
SOLO = {"projector": {"kind": "linear"}}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Published weights of a decoder and two encoders: what mixtures have in common."""
    folder = tmp_path_factory.mktemp("published")
    setup = build(recipe())
    setup.model.model.language_model.save_pretrained(folder / "words")
    setup.processor.tokenizer.save_pretrained(folder / "words")
    trunk = setup.model.model.encoders[0].tower
    trunk.save_pretrained(folder / "eye")
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.mul_(1.1)
    trunk.save_pretrained(folder / "other")
    return folder


def mixture(words, eyes, *stages, join=2, **more):
    """Encoders by name, each aligned alone where ``stages`` say so, then one joint stage of other data."""
    weights = {"weights": str(words / "words")}
    known = {
        "eye": {**SIGLIP, "weights": str(words / "eye")},
        "other": {**SIGLIP, "weights": str(words / "other")},
        "net": CONVNEXT,
    }
    model = {
        **TINY["model"],
        "encoders": [known[name] for name in eyes],
        "fusion": {"kind": "sequence_append", "width": 8},
        "language_model": weights,
        "tokenizer": weights,
    }
    joint = stage("join", {"projector.*": 1e-2, "language_model.*": 1e-3}, synth("text_digits"), steps=join)
    return recipe(model=model, stages=[*(each(eyes) for each in stages), joint], **more)


def align(name, **changes):
    """A stage that trains the encoder of this name alone, wherever it stands; dropout draws as it goes."""

    def made(eyes):
        number = eyes.index(name)
        train = {f"encoders.{number}.*": 1e-3, "projector.*": 1e-2, "language_model.*norm*": 1e-3}
        alone = {"encoder": number, **SOLO}
        return {**stage(f"align_{name}_{number}", train, synth("colour"), solo=alone, steps=2), **changes}

    return made


def weights(out):
    return load_file(out / "model" / "model.safetensors")


def kept(folder):
    return sorted(path.name for path in folder.iterdir())


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_two_mixtures_share_an_encoder_that_was_aligned_once(words, tmp_path):
    one, two = mixture(words, ["net", "eye"], align("eye")), mixture(words, ["eye", "other"], align("eye"))
    train(one, tmp_path / "one")
    (key,) = kept(tmp_path / ".aligned")
    before = json.loads((tmp_path / ".aligned" / key / "manifest.json").read_text())
    said = train(two, tmp_path / "two")
    assert f"align_eye_0: not trained; its result was there already: {tmp_path / '.aligned' / key}" in said
    assert "align_eye_0: what trains" not in said
    train(two, tmp_path / "alone" / "two")
    assert kept(tmp_path / "alone" / ".aligned") == [key] == kept(tmp_path / ".aligned")
    found = json.loads((tmp_path / "alone" / ".aligned" / key / "manifest.json").read_text())["files"]
    # What was learnt beside another encoder, at another place, is the same bit for bit; so is what follows.
    tensors = "tensors.safetensors"
    assert found[tensors]["sha256"] == before["files"][tensors]["sha256"]
    assert same(weights(tmp_path / "two"), weights(tmp_path / "alone" / "two"))
    reused, *rest = told(tmp_path / "two")
    assert reused["reused"].endswith(key)
    assert [row["global_step"] for row in (reused, *rest)] == [2, 3, 4]
    assert rest == told(tmp_path / "alone" / "two")[2:]
    stored = load_file(tmp_path / ".aligned" / key / tensors)
    assert {name.split(".")[1] for name in stored} == {"encoder", "language_model"}


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": {"weight_decay": 0.1}},
        {"steps": 3},
        {"precision": "bf16"},
        {"train": {"encoders.0.*": 2e-3, "projector.*": 1e-2, "language_model.*norm*": 1e-3}},
        {"data": [synth("caption")]},
        {"solo": {"encoder": 0, "projector": {"kind": "mlp"}}},
        {"before": [{"kind": "reinitialise", "parameters": ["encoders.0.*"]}]},
        {"solo": {"encoder": 0, **SOLO, "reuse": False}},
    ],
)
def test_whatever_changes_the_result_makes_it_another(words, tmp_path, changes):
    shorter = {"join": 1}
    train(mixture(words, ["eye"], align("eye"), **shorter), tmp_path / "one")
    said = train(mixture(words, ["eye"], align("eye", **changes), **shorter), tmp_path / "two")
    assert "not trained" not in said
    assert len(kept(tmp_path / ".aligned")) == (1 if "reuse" in changes.get("solo", {}) else 2)


def test_what_changes_no_number_changes_no_key(words, tmp_path):
    train(mixture(words, ["eye"], align("eye")), tmp_path / "one")
    same_again = align("eye", save_every_steps=None, workers=1)
    elsewhere = mixture(words, ["eye"], same_again, results=str(tmp_path / ".aligned"))
    assert "not trained" in train(elsewhere, tmp_path / "far" / "two")
    assert "not trained" not in train(mixture(words, ["eye"], same_again, seed=1), tmp_path / "three")


def test_a_damaged_result_is_computed_again(words, tmp_path):
    what = mixture(words, ["eye"], align("eye"))
    train(what, tmp_path / "one")
    (key,) = kept(tmp_path / ".aligned")
    file = tmp_path / ".aligned" / key / "tensors.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    said = train(what, tmp_path / "two")
    assert "was changed or damaged" in said
    assert "it is computed again" in said
    assert file.read_bytes() == whole
    assert same(weights(tmp_path / "one"), weights(tmp_path / "two"))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_run_that_took_a_result_resumes_bit_for_bit(words, tmp_path, monkeypatch, steps):
    """Stopped in the second alignment, at its end, and after both; the first was taken over."""
    first = mixture(words, ["eye"], align("eye"), join=1)
    what = mixture(words, ["eye", "other"], align("eye"), align("other"))
    for run in ("whole", "cut"):
        train(first, tmp_path / run / "first")
    train(what, tmp_path / "whole" / "run")
    out = tmp_path / "cut" / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        with pytest.raises(InterruptedRunError):
            train(what, out)
    train(what, out, resume=True)
    tidy = [
        [{**row, "reused": bool(row.get("reused"))} for row in told(tmp_path / run / "run")]
        for run in ("whole", "cut")
    ]
    assert tidy[0] == tidy[1]
    last = "3-join-0000002"
    theirs = digest(tmp_path / "whole" / "run" / "checkpoints" / last)
    assert digest(out / "checkpoints" / last) == theirs
    assert kept(tmp_path / "cut" / ".aligned") == kept(tmp_path / "whole" / ".aligned")
    assert len(kept(tmp_path / "cut" / ".aligned")) == 2


def test_runs_that_end_at_once_leave_one_result_and_another_model_refuses_it(words, tmp_path):
    what = mixture(words, ["eye"], align("eye"))
    stage, setup = what.stages[0], build(what)
    ran = running(setup, stage, (0, 0))
    start = Start(key="k", tensors=dict.fromkeys(ran.model.state_dict(), ""))
    assert take(tmp_path, start, stage, ran, Processes()) is None
    whole = Start(key="k", tensors={n.replace("encoders.0", "encoder"): "" for n in start.tensors})
    with ThreadPoolExecutor(4) as runs:
        given = [runs.submit(give, tmp_path, whole, stage, ran, Processes()) for _ in range(8)]
    assert (
        {each.result() for each in given}
        == {tmp_path / "k"}
        == {take(tmp_path, whole, stage, ran, Processes())}
    )
    assert kept(tmp_path) == ["k"]
    other = mixture(words, ["net"], align("net"))
    smaller = running(build(other), other.stages[0], (0, 0))
    with pytest.raises(CheckpointError, match="has no place in this model"):
        take(tmp_path, whole, other.stages[0], smaller, Processes())
