"""Storage or memory that fails under a run: the exit code, the remedy, a checkpoint that is whole."""

import dataclasses
import errno
import os
import shutil
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from typer.testing import CliRunner

from tests.runs import TINY, digest, one_stage, stage, synth, told, train
from vlmix.cli.main import app
from vlmix.core.errors import DiskFullError, InterruptedRunError, VlmixError
from vlmix.core.files import run_lock
from vlmix.data.ledger import Ledger
from vlmix.train import stages
from vlmix.train.checkpoint import newest
from vlmix.train.parallel import pieces
from vlmix.train.records import MetricsFile, TensorBoard, reused_stage

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


def no_memory_there():
    raise torch.OutOfMemoryError("CUDA out of memory")


def no_memory_here():
    torch.empty(1 << 50)  # a pebibyte: the allocator's own words


@pytest.mark.parametrize("act", [no_memory_there, no_memory_here])
@pytest.mark.parametrize("step", [1, 3])
def test_a_batch_without_memory_names_itself_and_the_run_goes_on_as_advised(tmp_path, monkeypatch, step, act):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, step, act, "_update")
        with pytest.raises(
            VlmixError, match=rf"step {step}: no memory left for 4 samples \(.*set gradient_checkpointing"
        ) as caught:
            train(one_stage(), out)
    assert caught.value.exit_code == 1
    found = newest(out / "checkpoints")
    assert (found.state.step if found else 0) == step - 1
    train(one_stage(gradient_checkpointing=True, max_bad=0.2, worker_timeout=9.0), out, resume=True)
    train(one_stage(), tmp_path / "whole")
    assert told(out) == told(tmp_path / "whole")
    name = "checkpoints/1-only-0000003"
    assert digest(out / name) == digest(tmp_path / "whole" / name)


def test_another_error_of_a_step_stays_what_it_is(tmp_path, monkeypatch):
    def wrong():
        torch.ones(2) @ torch.ones(3)

    at_step(monkeypatch, 1, wrong, "_update")
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        train(one_stage(), tmp_path / "run")


def test_a_second_signal_ends_the_run_at_once_and_says_so(tmp_path, monkeypatch):
    def twice():
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 2, twice)
        with pytest.raises(InterruptedRunError, match=r"at once.*SIGINT.*intact.*--resume") as caught:
            train(one_stage(), out)
    assert caught.value.exit_code == 130
    assert newest(out / "checkpoints").state.step == 1
    train(one_stage(), out, resume=True)
    train(one_stage(), tmp_path / "whole")
    assert told(out) == told(tmp_path / "whole")


def test_a_disk_that_is_full_for_metrics_events_or_bad_rows_is_said(tmp_path, monkeypatch):
    def full(*given, **named):
        raise OSError(errno.ENOSPC, "No space left on device")

    record = reused_stage("only", 1, 1, tmp_path)
    record = dataclasses.replace(record, seconds=1.0, loss=1.0)
    metrics, events = MetricsFile(tmp_path / "metrics.jsonl", 0), TensorBoard(tmp_path / "events", 0)
    metrics._file.close()
    metrics._file = mock.Mock(write=full, close=full)
    monkeypatch.setattr(events, "_writer", mock.Mock(add_scalar=full, close=full))
    ledger = Ledger(tmp_path / "quarantine.jsonl")
    monkeypatch.setattr(Path, "open", full)
    for act in (
        lambda: metrics.step(record),
        metrics.close,
        lambda: events.step(record),
        events.close,
        lambda: ledger.quarantine(("a", 1), 1, "b", "c"),
    ):
        with pytest.raises(DiskFullError, match=r"intact.*--resume"):
            act()


def test_a_run_folder_that_vanishes_is_named(tmp_path, monkeypatch):
    out = tmp_path / "run"
    at_step(monkeypatch, 2, lambda: shutil.rmtree(out))
    with pytest.raises(VlmixError, match="run is gone") as caught:
        train(one_stage(), out)
    assert caught.value.exit_code == 1


def test_a_run_folder_that_vanishes_under_a_save_is_named(tmp_path, monkeypatch):
    out, real = tmp_path / "run", pieces.save_file

    def gone(*given):
        shutil.rmtree(out)
        return real(*given)

    monkeypatch.setattr(pieces, "save_file", gone)
    with pytest.raises(VlmixError, match="run is gone"):
        train(one_stage(), out)


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
