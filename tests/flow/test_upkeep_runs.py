"""Optimizers, averages and skipped updates in whole runs: what is published; stopping changes nothing."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.runs import TINY, digest, one_stage, stage, synth, told, train
from vlmix.core.errors import NonFiniteError, RecipeError, SpikeError
from vlmix.core.settings import read_settings
from vlmix.train import stages
from vlmix.train.recipe import Recipe

pytestmark = pytest.mark.flow

FLAT = {"kind": "constant", "warmup_steps": 2}
KINDS = {
    "muon": {"optimizer": {"kind": "muon"}, "schedule": {"kind": "wsd"}, "layer_decay": 0.8},
    "adamw8bit": {"optimizer": {"kind": "adamw8bit", "least": 64}, "ema": {"decay": 0.9}},
    "schedule_free": {"optimizer": {"kind": "schedule_free"}, "schedule": FLAT, "spikes": {}},
}
NEEDS = {"adamw8bit": "bitsandbytes", "schedule_free": "schedulefree"}


def two_stages(**more):
    first = stage("first", {"*": 1e-2}, synth("colour"), steps=4, **more)
    second = stage("second", {"projector.*": 1e-2}, synth("caption"), steps=1)
    return read_settings(Recipe, {**TINY, "stages": [first, second]})


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_killed_run_ends_as_if_nothing_had_happened(kind, tmp_path):
    pytest.importorskip(NEEDS.get(kind, "torch"), reason="needs the extra `optim`")
    what = two_stages(**KINDS[kind])
    whole, out, kept = tmp_path / "whole", tmp_path / "run", tmp_path / "kept"
    real = stages.checkpoint.save

    def keep(root, *given, **more):
        folder = real(root, *given, **more)
        if root.parent == whole:
            shutil.copytree(whole, kept / folder.name, ignore=shutil.ignore_patterns("model"))
        return folder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.checkpoint, "save", keep)
        train(what, whole)
    for name in ("1-first-0000002", "1-first-0000004"):
        shutil.copytree(kept / name, out)
        assert f"after step {int(name[-1])}" in train(what, out, resume=True)
        last = "2-second-0000001"
        assert digest(out / "checkpoints" / last) == digest(whole / "checkpoints" / last)
        assert told(out) == told(whole)
        shutil.rmtree(out)


@pytest.mark.parametrize(
    "averaged",
    [{"ema": {"decay": 0.5}}, {"optimizer": {"kind": "schedule_free"}}],
    ids=["ema", "schedule_free"],
)
def test_a_stage_hands_on_averages_and_checkpoints_on_the_way_hold_what_trains(averaged, tmp_path):
    """The last checkpoint and the model hold the averages, the one before what the next step began from."""
    handed = []
    real = stages.Upkeep.hand_on

    def hand_on(self, optimizer):
        inside = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        before = [parameter.detach().clone() for parameter in inside]
        real(self, optimizer)
        handed.append([not torch.equal(a, b) for a, b in zip(before, inside, strict=True)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.Upkeep, "hand_on", hand_on)
        train(one_stage(steps=4, schedule=FLAT, **averaged), tmp_path / "run")
    assert len(handed) == 1
    assert any(handed[0])
    root = tmp_path / "run" / "checkpoints"
    published, last = weights(tmp_path / "run" / "model"), weights(root / "1-only-0000004")
    assert {*last} == {*published}
    assert all(torch.equal(published[name], last[name]) for name in last)


def test_averaging_changes_no_step_of_training(tmp_path):
    train(one_stage(steps=3), tmp_path / "plain")
    train(one_stage(steps=3, ema={"decay": 0.5}), tmp_path / "ema")
    assert told(tmp_path / "plain") == told(tmp_path / "ema")
    plain, ema = tmp_path / "plain" / "checkpoints", tmp_path / "ema" / "checkpoints"
    name = "1-only-0000002"
    assert digest(plain / name) == digest(ema / name)
    assert (ema / name / "ema.safetensors").is_file()
    assert not (ema / "1-only-0000003" / "ema.safetensors").exists()
    raw, averaged = weights(plain / "1-only-0000003"), weights(ema / "1-only-0000003")
    assert any(not torch.equal(raw[key], averaged[key]) for key in raw)


def poison(patch, *steps, by=float("nan")):
    """Multiply the losses of the given steps (from 1)."""
    real = stages.StageLoop._update
    backward = stages.StageLoop._backward
    now = []

    def update(self, step, data):
        now[:] = [step + 1]
        return real(self, step, data)

    def multiplied(self, *given):
        loss, part = backward(self, *given)
        return (loss * by if now[0] in steps else loss), part

    patch.setattr(stages.StageLoop, "_update", update)
    patch.setattr(stages.StageLoop, "_backward", multiplied)


def test_bad_updates_are_skipped_told_and_stay_skipped_after_a_resume(tmp_path, monkeypatch):
    poison(monkeypatch, 2, 4)
    what = one_stage(steps=5, spikes={"non_finite": "skip", "least": 3})
    out = tmp_path / "run"
    train(what, out)
    rows = told(out)
    assert [row["step"] for row in rows if "skipped" in row] == [2, 4]
    assert [row["loss"] is None for row in rows] == [False, True, False, True, False]
    lines = [json.loads(line) for line in (out / "spikes.jsonl").read_text().splitlines()]
    assert [(line["step"], line["action"], line["loss"]) for line in lines] == [
        (2, "skip", None),
        (4, "skip", None),
    ]
    assert all(len(line["samples"]) == 4 for line in lines)
    again = tmp_path / "again"
    shutil.copytree(out, again)
    shutil.rmtree(again / "model")
    for name in ("1-only-0000005",):
        shutil.rmtree(again / "checkpoints" / name)
    (again / "spikes.jsonl").write_text(
        (out / "spikes.jsonl").read_text() + '{"global_step": 5, "x": 1}\n{"cut'
    )
    train(what, again, resume=True)
    assert told(again) == rows
    assert (again / "spikes.jsonl").read_text() == (out / "spikes.jsonl").read_text()
    assert digest(again / "checkpoints" / "1-only-0000005") == digest(out / "checkpoints" / "1-only-0000005")


def test_a_spike_stops_where_the_recipe_says_so_and_weights_stay(tmp_path, monkeypatch):
    poison(monkeypatch, 5, by=1e3)
    what = one_stage(steps=6, spikes={"action": "stop", "least": 3, "watch": ["loss"]})
    with pytest.raises(SpikeError, match=r"stage only, step 5: loss .* is above .*not changed") as caught:
        train(what, tmp_path / "run")
    assert caught.value.exit_code == 3
    assert len(told(tmp_path / "run")) == 4
    assert json.loads((tmp_path / "run" / "spikes.jsonl").read_text())["action"] == "stop"
    monkeypatch.undo()
    poison(monkeypatch, 2, 3, 4)
    with pytest.raises(NonFiniteError, match="step 4: the loss"):
        train(one_stage(steps=6, spikes={"non_finite": "skip", "in_a_row": 2}), tmp_path / "other")


def test_what_does_not_go_together_is_refused_before_anything_is_written(tmp_path):
    free = {"optimizer": {"kind": "schedule_free"}}
    for more, message in (
        (free, r"stages\.0\.schedule: schedule_free wants rates that stay"),
        ({**free, "schedule": FLAT, "ema": {}}, r"stages\.0\.ema: schedule_free averages"),
        ({"optimizer": {"decay": 1}}, r"stages\.0\.optimizer\.decay: unknown key.*weight_decay"),
    ):
        with pytest.raises(RecipeError, match=message):
            train(one_stage(**more), tmp_path / "run")
    assert not (tmp_path / "run").exists()
