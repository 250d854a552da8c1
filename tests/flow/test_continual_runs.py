"""Runs over several tasks: mixed, merged, stopped anywhere and gone on with bit for bit."""

import hashlib
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from tests.runs import CONVNEXT, LANGUAGE, TINY, digest, recipe, stage, synth, told, train
from vlmix.core.errors import InterruptedRunError, PlanError, RecipeError
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.train import stages
from vlmix.train.build import recipe_config
from vlmix.train.continual import CONTINUAL
from vlmix.train.costs import stage_costs

pytestmark = pytest.mark.flow
WORDS = {"projector.*": 1e-2, "language_model.*": 1e-2}
FIRST = {**stage("first", WORDS, synth("colour")), "task": "colours", "publish": True}
SECOND = {**stage("second", WORDS, synth("text_digits", size=6), synth("count")), "task": "digits"}
METHODS = [CONTINUAL.get(name).settings_class.tiny().model_dump(mode="json") for name in CONTINUAL.names()]


def tasks(method, *, model=None, **changes):
    listed = [TINY["stages"][0], {**FIRST, **changes}, SECOND]
    return recipe(stages=listed, continual=method, **({} if model is None else {"model": model}))


def of(kind):
    return next(raw for raw in METHODS if raw["kind"] == kind)


def stop_after(monkeypatch, steps):
    seen, real = 0, stages.StageLoop._record

    def record(self, *args):
        nonlocal seen
        seen += 1
        if seen == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *args)

    monkeypatch.setattr(stages.StageLoop, "_record", record)


def everything(folder):
    """``digest``, and what the method keeps."""
    path = folder / "continual.safetensors"
    kept = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    return {**digest(folder), "continual": kept}


@pytest.mark.parametrize("method", METHODS, ids=lambda raw: raw["kind"])
def test_a_run_stopped_in_or_between_tasks_resumes_bit_for_bit(method, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "run"
    train(tasks(method), whole)
    for place, steps in enumerate((4, 2)):  # inside the first task, and at its end
        with monkeypatch.context() as patch:
            stop_after(patch, steps)
            with pytest.raises(InterruptedRunError):
                train(tasks(method), out, resume=place > 0)
    train(tasks(method), out, resume=True)
    assert told(out) == told(whole)
    for name in ("3-second-0000002", "3-second-0000003"):
        found, expected = (everything(run / "checkpoints" / name) for run in (out, whole))
        assert found == expected
    for name in ("model", "models/first"):
        found, expected = ((run / name / "model.safetensors").read_bytes() for run in (out, whole))
        assert found == expected
    if method["kind"] != "msgm":
        return
    shutil.rmtree(out / "model")
    train(tasks(method), out, resume=True)  # from the last checkpoint of all
    assert (out / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()


def test_the_model_after_each_task_is_an_ordinary_folder(tmp_path):
    train(tasks(of("msgm_rehearsal")), tmp_path / "run")
    after = [
        VlmixForConditionalGeneration.from_pretrained(tmp_path / "run" / name)
        for name in ("models/first", "model")
    ]
    assert not any(model.config.adapters for model in after)
    first, last = (dict(model.named_parameters()) for model in after)
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    assert any(".q_proj." in name for name in moved)
    assert not [name for name in moved if "encoders" in name or "embed" in name or "norm" in name]
    assert load_file(
        tmp_path / "run/checkpoints/3-second-0000003/model.safetensors"
    ).keys() > first.keys() - {name for name in first if "_proj." in name}


def test_rows_of_earlier_tasks_come_again_and_a_stage_without_task_knows_nothing_of_it(tmp_path, monkeypatch):
    seen = {}
    real = stages.StageLoop._update

    def update(self, step, data):
        seen.setdefault(self.stage.name, []).extend(data.sample_ids)
        return real(self, step, data)

    monkeypatch.setattr(stages.StageLoop, "_update", update)
    first = {**FIRST, "data": [synth("colour", seed=5)]}
    second = {**SECOND, "steps": None, "epochs": 1}
    found = {}
    for method in ({"kind": "rehearsal", "share": 0.2}, {"kind": "replay_buffer", "size": 4, "ratio": 0.5}):
        seen.clear()
        out = tmp_path / method["kind"]
        train(recipe(stages=[TINY["stages"][0], first, second], continual=method), out)
        again = [name for name in seen["second"] if name.startswith("synth-5-")]
        found[method["kind"]] = again
        assert len(seen["second"]) == 6 + 20 + 4
        if method["kind"] == "replay_buffer":
            assert set(again) <= set(seen["first"])  # of twenty rows, the twelve it was trained on
    assert len(found["rehearsal"]) == len(set(found["rehearsal"])) == 4
    assert len(found["replay_buffer"]) == 15
    assert told(tmp_path / "rehearsal")[:6] == told(tmp_path / "replay_buffer")[:6]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "digits"}, "two stages are the task digits"),
        ({"train": {"projector.*": 1e-3}}, "reaches none of its Linears"),
        ({"solo": {"encoder": 0, "projector": {"kind": "linear"}}}, "remove `solo` or `task`"),
    ],
)
def test_tasks_that_cannot_be_are_refused_before_anything_is_written(changes, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        train(tasks(of("lora"), **changes), tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_a_method_without_tasks_or_beside_other_adapters_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="no stage has a `task`"):
        recipe(continual={"kind": "lora"})
    adapted = {**TINY["model"], "adapters": [{"match": ["language_model.*"]}]}
    with pytest.raises(PlanError, match="adapters` of its own"):
        train(tasks({"kind": "lora"}, model=adapted), tmp_path / "run")
    with pytest.raises(RecipeError, match=r"continual\.alpha"):
        train(tasks({"kind": "soft_targets", "alpha": 2}), tmp_path / "other")


@pytest.mark.parametrize("kind", ["soft_targets", "lwf"])
def test_packed_rows_teach_what_padded_ones_do(kind, tmp_path):
    """Nothing random in the model; a teacher answers each conversation of a packed row by itself."""
    still = {
        **TINY["model"],
        "encoders": [TINY["model"]["encoders"][0], {**CONVNEXT, "drop_path": 0.0}],
        "language_model": {**LANGUAGE, "attention_dropout": 0.0},
    }
    ways = {"padded": {"micro_batch_size": 2}, "packed": {"batching": {"pack": True, "tokens": 128}}}
    for name, more in ways.items():
        # The usual eps would make a full step of the rounding in gradients near 0.
        given = {"batch_size": 6, "optimizer": {"eps": 1e-3}, **more}
        one = {**stage("first", WORDS, synth("caption"), synth("colour"), **given), "task": "first"}
        train(recipe(model=still, stages=[one], continual=of(kind)), tmp_path / name)
    padded, packed = (told(tmp_path / name) for name in ways)
    assert all(row["positions"] == row["tokens"] for row in packed)
    assert sum(row["positions"] for row in padded) > sum(row["tokens"] for row in padded)
    for key in ("loss", "grad_norm"):
        # float32 sums in another order; through two updates at a rate of 1e-2.
        assert [row[key] for row in packed] == pytest.approx([row[key] for row in padded], rel=1e-5)


def test_a_plan_counts_rows_that_come_again_and_what_a_method_keeps():
    epochs = {"steps": None, "epochs": 1}
    stages = [TINY["stages"][0], {**FIRST, **epochs}, {**SECOND, **epochs}]

    def costs(**method):
        what = recipe(stages=stages, continual=method)
        return stage_costs(what, recipe_config(what), images=1, text_tokens=8)

    plain, again = costs(kind="naive"), costs(kind="rehearsal", share=0.2)
    assert [cost.steps for cost in plain] == [3, 5, 7]
    assert [cost.steps for cost in again] == [3, 5, 8]  # 6 and 20 rows, and four of the first task's
    assert again[2].notes == ("4 rows come again of colours",)
    assert costs(kind="replay_buffer", size=5)[2].notes == ("5 rows come again of buffer",)
    taught = costs(kind="lwf")
    assert [cost.method_bytes for cost in taught] == [0, *(4 * cost.trainable for cost in plain[1:])]
    assert taught[0].flops_per_sample == plain[0].flops_per_sample
    assert 1.2 < taught[1].flops_per_sample / plain[1].flops_per_sample < 1.6  # one more forward pass
    lora = costs(kind="msgm", soft_targets={"spread": "teacher"})
    assert lora[1].method_bytes == 4 * lora[1].trainable < taught[1].method_bytes
    assert costs(kind="ewc")[1].method_bytes == 2 * taught[1].method_bytes
