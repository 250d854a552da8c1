"""Stopped, killed, damaged or disputed runs: what goes on, bit for bit, and what is refused."""

import os
import shutil
import signal
import threading

import pytest
import torch

from tests.runs import TINY, digest, recipe, told, train
from vlmix.core.errors import (
    CheckpointError,
    InputError,
    InterruptedRunError,
    RunLockedError,
)
from vlmix.core.files import run_lock, verify_manifest, write_manifest
from vlmix.train import stages
from vlmix.train.build import build, load_setup
from vlmix.train.checkpoint import SCHEMA, unique_tensors

pytestmark = pytest.mark.flow


def stop_after(monkeypatch, steps):
    """Ask for a stop, as Ctrl-C does, when ``steps`` steps of the run are done."""
    seen = 0
    real = stages.StageLoop._record

    def record(self, *args):
        nonlocal seen
        seen += 1
        if seen == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *args)

    monkeypatch.setattr(stages.StageLoop, "_record", record)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6])
def test_a_stopped_run_resumes_bit_for_bit(whole, tmp_path, monkeypatch, steps):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        with pytest.raises(InterruptedRunError, match="--resume") as caught:
            train(recipe(), out)
    assert caught.value.exit_code == 130
    assert len(told(out)) == steps
    assert not (out / "model").exists()
    text = train(recipe(), out, resume=True)
    assert "resuming stage" in text
    for name in ("2-tune-0000002", "2-tune-0000003"):
        if steps < 6 or name.endswith("3"):
            assert digest(out / "checkpoints" / name) == digest(whole[0] / "checkpoints" / name)
    assert told(out) == told(whole[0])
    assert (out / "model" / "model.safetensors").read_bytes() == (
        whole[0] / "model" / "model.safetensors"
    ).read_bytes()


def test_a_run_killed_between_checkpoints_repeats_what_was_lost(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints" / "2-tune-0000003")
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "tune", "st')
    train(recipe(), out, resume=True)
    assert told(out) == told(whole[0])
    assert digest(out / "checkpoints" / "2-tune-0000003") == digest(
        whole[0] / "checkpoints" / "2-tune-0000003"
    )


def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    shutil.rmtree(out / "model")
    weights = out / "checkpoints" / "2-tune-0000003" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-5] ^= 1
    weights.write_bytes(raw)
    text = train(recipe(), out, resume=True)
    assert "was changed or damaged" in text
    assert "going on from 2-tune-0000002" in text
    assert digest(out / "checkpoints" / "2-tune-0000003") == digest(
        whole[0] / "checkpoints" / "2-tune-0000003"
    )
    for folder in (out / "checkpoints").iterdir():
        (folder / "state.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        train(recipe(), out, resume=True)


def test_resuming_with_another_recipe_or_other_data_names_the_difference(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    changed = [TINY["stages"][0], {**TINY["stages"][1], "batch_size": 5}]
    with pytest.raises(CheckpointError, match=r"stages\.1\.batch_size: 4 -> 5"):
        train(recipe(stages=changed), out, resume=True)
    swapped = {**TINY["stages"][1], "train": {"encoders.0.*": 1e-3, "*": 1e-2}}
    with pytest.raises(CheckpointError, match=r"stages\.1\.train \(order\)"):
        train(recipe(stages=[TINY["stages"][0], swapped]), out, resume=True)
    free = [{**each, "workers": 2, "save_every_steps": None} for each in TINY["stages"]]
    train(recipe(stages=free, evals=[{"benchmark": {"kind": "synth_qa"}}]), out, resume=True)
    state = out / "checkpoints" / "2-tune-0000003" / "state.json"
    state.write_text(state.read_text().replace('"order": "', '"order": "0'))
    write_manifest(state.parent, SCHEMA)
    with pytest.raises(CheckpointError, match="the data of stage tune changed"):
        train(recipe(), out, resume=True)


def test_a_folder_in_use_or_not_empty_is_refused(whole, tmp_path):
    with pytest.raises(InputError, match="--resume"):
        train(recipe(), whole[0])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not a run"):
        train(recipe(), tmp_path / "other", resume=True)
    errors = []

    def second():
        try:
            train(recipe(), tmp_path / "run")
        except RunLockedError as error:
            errors.append(error)

    with run_lock(tmp_path / "run"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert [error.exit_code for error in errors] == [5]
    assert not (tmp_path / "run").exists()


def test_a_run_stopped_before_its_first_checkpoint_begins_again(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints")
    train(recipe(), out, resume=True)
    assert told(out) == told(whole[0])
    verify_manifest(out / "model")
    setup = load_setup(out / "setup", 0)
    first = unique_tensors(build(recipe()).model)
    assert all(torch.equal(first[name], tensor) for name, tensor in unique_tensors(setup.model).items())


def test_a_run_killed_while_it_was_written_down_had_not_begun(whole, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    shutil.copytree(whole[0] / "setup", out / "setup")
    shutil.copy(whole[0] / "versions.json", out)
    train(recipe(), out)
    assert told(out) == told(whole[0])
    verify_manifest(out / "model")
