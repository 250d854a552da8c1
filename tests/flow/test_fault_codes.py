"""Storage or memory that fails under a run: the exit code, the remedy, a checkpoint that is whole."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from tests.runs import TINY, one_stage, stage, synth, told, train
from vlmix.cli.main import app
from vlmix.core.errors import VlmixError
from vlmix.core.files import run_lock
from vlmix.train import stages
from vlmix.train.checkpoint import newest

pytestmark = pytest.mark.flow


def at_step(monkeypatch, number, act, method="_record"):
    """Do something when a run is in its step ``number``."""
    seen = []
    real = getattr(stages.StageLoop, method)

    def acting(self, *given):
        seen.append(1)
        if len(seen) == number:
            act()
        return real(self, *given)

    monkeypatch.setattr(stages.StageLoop, method, acting)


def no_memory():
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_batch_without_memory_names_itself_and_the_last_checkpoint_goes_on(tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 3, no_memory, "_update")
        with pytest.raises(
            VlmixError, match=r"step 3: no memory left for 4 samples \(.*micro_batch_size"
        ) as caught:
            train(one_stage(), out)
    assert caught.value.exit_code == 1
    assert newest(out / "checkpoints").state.step == 2
    train(one_stage(), out, resume=True)
    train(one_stage(), tmp_path / "whole")
    assert told(out) == told(tmp_path / "whole")


def test_a_run_folder_that_vanishes_is_named(tmp_path, monkeypatch):
    out = tmp_path / "run"
    at_step(monkeypatch, 2, lambda: shutil.rmtree(out))
    with pytest.raises(VlmixError, match="run is gone") as caught:
        train(one_stage(), out)
    assert caught.value.exit_code == 1


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "stages": [stage("only", {"*": 1e-2}, synth("colour"))]}))
    return path


def test_a_folder_that_cannot_be_written_is_refused(recipe_file):
    done = CliRunner().invoke(app, ["train", str(recipe_file), "--out", "/proc/vlmix"])
    assert done.exit_code != 0
    assert isinstance(done.exception, VlmixError)
    assert done.exception.exit_code == 2
    assert "/proc/vlmix cannot be used as a folder" in str(done.exception)
    assert not Path("/proc/vlmix").exists()


def test_a_folder_in_use_is_refused(recipe_file, tmp_path):
    with run_lock(tmp_path / "run"):
        done = CliRunner().invoke(app, ["train", str(recipe_file), "--out", str(tmp_path / "run")])
    assert isinstance(done.exception, VlmixError)
    assert done.exception.exit_code == 5
