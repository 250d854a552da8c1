"""What goes wrong on one of several processes: all end, soon and in words a stranger understands."""

import errno
import gc
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests import processes
from tests.flow.test_parallel_combinations import EPS, EXPERTS, agree, go, what
from tests.flow.test_parallel_parts import ended, waiting
from tests.runs import one_stage, synth, train
from tests.tiny import config
from vlmix.core.errors import DiskFullError, InputError, VlmixError
from vlmix.core.parallel import ParallelSettings
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.train.parallel import gathering
from vlmix.train.parallel.idle import idle_notes
from vlmix.train.parallel.processes import joined

pytestmark = [pytest.mark.flow, pytest.mark.slow]


def threads():
    """The names of this process's threads, those of libraries too."""
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]


def leaving(folder):
    with joined(ParallelSettings(kind="ddp")) as team:
        model = VlmixForConditionalGeneration(config()).train()
        team.prepare(model)
        ids = torch.full((1, 6), 5)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        during = sum("gloo" in name or "store" in name for name in threads())
    del model, team
    gc.collect()
    after = sum("gloo" in name or "store" in name for name in threads())
    (folder / f"{os.environ['RANK']}.txt").write_text(f"{during > 0} {after}")


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are listed in /proc")
def test_no_thread_of_a_group_outlives_it(tmp_path):
    processes.run(leaving, tmp_path)
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == ["True 0", "True 0"]


def no_room(given, out):
    """The whole run, with a disk that is full for the first file of the finished model."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    started = None
    real = gathering.gather_model

    def noted(*given, **named):
        nonlocal started
        started = time.monotonic()
        return real(*given, **named)

    with (
        mock.patch.object(gathering, "save_file", full),
        mock.patch("vlmix.train.finished.gather_model", noted),
    ):
        try:
            train(given, out)
        except VlmixError as error:
            return type(error).__name__, str(error), time.monotonic() - started
    return "nothing", "", 0.0


def test_a_full_disk_while_the_model_is_gathered_ends_all(tmp_path):
    given = one_stage(synth("colour"), steps=1, micro_batch_size=2)
    with processes.Crew() as crew:
        found = crew.run(no_room, given, tmp_path / "run", seconds=120)
    assert [name for name, _, _ in found] == [DiskFullError.__name__] * 2
    assert "free some space" in found[0][1]
    assert "failed on another process" in found[1][1]
    assert all(took < 20 for _, _, took in found)


def test_a_process_without_routed_pictures_counts_with_the_others(tmp_path):
    """Rounds in which one process has a picture and the other words: only one has a balance loss."""
    changes = {
        "model": {"experts": [{**EXPERTS, "place": "encoders.0"}]},
        "batch_size": 2,
        "micro_batch_size": 1,
        "steps": 6,
        "optimizer": EPS,
    }
    one = go(what(tmp_path, **changes), tmp_path / "one")
    assert any("balance" in row for row in one)
    with processes.Crew() as crew:
        two = crew.run(go, what(tmp_path, **changes), tmp_path / "two", seconds=120)[0]
    agree(one, two)


def lingering(folder, how):
    held = []

    def fail():
        raise InputError("only here")

    with suppress(InputError), joined(ParallelSettings(**how)) as team:
        # Somebody holds on to the groups, so that no connection breaks.
        held += team.mesh.get_all_groups()
        if team.rank == 1:
            fail()
        team.barrier()
    (folder / "failed").write_text(str(len(held)))
    time.sleep(600)


def test_a_process_that_fails_and_stays_does_not_keep_the_others_waiting(tmp_path):
    context = processes.start(lingering, tmp_path, {"timeout_s": 2.0})
    while not (tmp_path / "failed").is_file():
        time.sleep(0.05)
    started = time.monotonic()
    while context.processes[0].is_alive() and time.monotonic() - started < 60:
        time.sleep(0.05)
    assert ended(context, 0)[0] == 1
    assert time.monotonic() - started < 20


def test_all_end_when_one_is_silent_and_not_its_neighbour_alone(tmp_path):
    context = processes.start(waiting, tmp_path, {"timeout_s": 2.0}, world=3)
    while not all((tmp_path / str(rank)).is_file() for rank in range(3)):
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(context.processes[1].pid, signal.SIGSTOP)
    others = [context.processes[rank] for rank in (0, 2)]
    last = time.monotonic() + 30
    while any(process.is_alive() for process in others) and time.monotonic() < last:
        time.sleep(0.05)
    codes = ended(context, 0)
    assert [codes[0], codes[2]] == [1, 1]


def test_processes_that_were_not_started_together_are_told_how(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(InputError, match="Start with torchrun, or unset WORLD_SIZE"),
        joined(ParallelSettings()),
    ):
        pass


def test_processes_without_a_micro_batch_are_told_of():
    stages = one_stage(batch_size=8).stages
    (note,) = idle_notes(stages, 4)
    assert "8 samples a step in micro-batches of 8 are 1 for 4 processes" in note
    assert "set micro_batch_size to 2 or less" in note
    assert not [*idle_notes(one_stage(batch_size=8, micro_batch_size=2).stages, 4)]
