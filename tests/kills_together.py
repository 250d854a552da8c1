"""Kills one of two processes of a run at chosen moments of a save, and says what was left.

Runs are pairs of children forked from this process, which has imported everything:
``python -m tests.kills_together FOLDER`` is such a process.
"""

import json
import os
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch

from tests.kills import digest, warm_up
from tests.processes import free_port
from tests.runs import one_stage, synth, told, train
from vlmix.core import files
from vlmix.train import checkpoint
from vlmix.train.checkpoint import CHECKPOINTS
from vlmix.train.parallel import pieces, publishing

WORLD, STEPS, SAVE = 2, 4, 3  # the third save of a run dies; two checkpoints are there
# Where a process kills itself: what it calls there, and how often in a save before. The step of the newest
# checkpoint follows: the third is there only once it was renamed.
MOMENTS = {
    "before the first piece": (1, checkpoint, "write", 0, 2),
    "between its pieces": (1, checkpoint, "write", 1, 2),
    "between the pieces of the first": (0, checkpoint, "write", 1, 2),
    "half a file": (1, pieces, "save_file", 1, 2),
    "after its last piece": (1, publishing, "_sync", 2, 2),
    "all pieces written, no manifest": (0, checkpoint, "write_manifest", 0, 2),
    "before publishing": (0, files, "_replace_folder", 0, 2),
    "published, the old one still there": (0, checkpoint, "discard", 0, 3),
}


def what():
    only = one_stage(synth("colour"), steps=STEPS, batch_size=4, micro_batch_size=2, save_every_steps=1)
    return only.model_copy(update={"parallel": only.parallel.model_copy(update={"timeout_s": 5.0})})


def dies(name, real, calls, before):
    """``real``, and the end of this process at call number ``before`` of the save in question."""

    def call(*given, **named):
        if calls["saves"] == SAVE:
            calls["seen"] += 1
            if calls["seen"] > before:
                if name == "save_file":
                    given[1].write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
        return real(*given, **named)

    return call


def child(out, rank, port, moment):
    """Run or resume as one of the processes, to its end or its moment; never returns."""
    code = 1
    try:
        torch.set_num_threads(1)
        said = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "MASTER_PORT": port}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in said.items()}}
        with ExitStack() as stack:
            if moment is not None and MOMENTS[moment][0] == rank:
                _, where, name, before, _ = MOMENTS[moment]
                calls, save = {"saves": 0, "seen": 0}, checkpoint.save

                def counted(*given, **named):
                    calls["saves"] += 1
                    return save(*given, **named)

                stack.enter_context(mock.patch.object(checkpoint, "save", counted))
                real = getattr(where, name)
                stack.enter_context(mock.patch.object(where, name, dies(name, real, calls, before)))
            train(what(), out, resume=(out / "recipe.yaml").exists())
        code = 0
    except BaseException as error:  # noqa: BLE001  (the parent is told)
        (out.parent / f"error-{rank}.txt").write_text(f"{type(error).__name__}: {error}")
    finally:
        os._exit(code)


def run(out, moment=None, seconds=120):
    """Exit codes of the pair, and how long the last of them took to end after the first."""
    port, pids = free_port(), []
    for rank in range(WORLD):
        pid = os.fork()
        if pid == 0:
            child(out, rank, port, moment)
        pids.append(pid)
    codes, first, last = {}, None, time.monotonic() + seconds
    while len(codes) < WORLD:
        for rank, pid in enumerate(pids):
            if rank in codes:
                continue
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[rank] = os.waitstatus_to_exitcode(status)
                first = first or time.monotonic()
            elif time.monotonic() > last:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[rank] for rank in range(WORLD)], time.monotonic() - first


def attack(folder):
    """For each moment, what was left and what came of it."""
    warm_up(folder / "warm")
    found = {}
    for number, moment in enumerate((None, *MOMENTS)):
        out = folder / str(number) / "run"
        out.parent.mkdir(parents=True)
        killed, took = run(out, moment) if moment else ([0, 0], 0.0)
        newest = checkpoint.newest(out / CHECKPOINTS) if moment else None
        codes, _ = run(out)
        found[moment or "never"] = {
            "killed": killed,
            "took": took,
            "step": newest.state.step if newest else 0,
            "problems": list(newest.problems) if newest else [],
            "codes": codes,
            "digest": digest(out),
            "told": told(out),
            "left": sorted(path.name for path in (out / CHECKPOINTS).iterdir()),
        }
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps(attack(Path(sys.argv[1]))))
