"""Kills a small run at random moments, again and again, and says where each kill fell and what was left.

Runs are children forked from this process, which has imported everything: ``python -m tests.kills FOLDER`` is
such a process. The phase a child was in stands in memory they share, so it is known after its death.
"""

import json
import mmap
import os
import random
import signal
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from tests.runs import one_stage, synth, told, train
from vlmix.core.files import sha256
from vlmix.train import checkpoint, run, stages
from vlmix.train.parallel import publishing

STARTING, TRAINING, SAVING, PUBLISHING = "starting", "training", "saving", "publishing"
PHASES = (STARTING, TRAINING, SAVING, PUBLISHING)
STEPS = 8


def what():
    return one_stage(synth("colour"), steps=STEPS, batch_size=2, save_every_steps=1)


def digest(out):
    return sha256(out / "model" / "model.safetensors")


@contextmanager
def in_place(folder):
    """How a folder is saved without care: over what is there, file by file."""
    folder.mkdir(parents=True, exist_ok=True)
    yield folder


def naive_save(root, state, model, named, optimizer, *rest, **more):
    """One checkpoint, always in the same place; its parts are of different steps if it is cut off."""
    with mock.patch.object(publishing, "publish", in_place):
        return SAVE(root, state.model_copy(update={"step": 0}), model, named, optimizer, *rest, **more)


SAVE, PUBLISH = checkpoint.save, run.publish_model


def child(out, phase, naive):
    """Run or resume, telling the phase; never returns."""
    code = 1
    try:
        torch.set_num_threads(1)

        def telling(name, real, *given, **named):
            before, phase[0] = phase[0], PHASES.index(name)
            try:
                return real(*given, **named)
            finally:
                phase[0] = before

        save = partial(telling, SAVING, naive_save if naive else SAVE)
        step = stages.StageLoop._train
        with (
            mock.patch.object(checkpoint, "save", save),
            mock.patch.object(
                stages.StageLoop, "_train", lambda self, *given: telling(TRAINING, step, self, *given)
            ),
            mock.patch("vlmix.train.run.publish_model", partial(telling, PUBLISHING, PUBLISH)),
        ):
            train(what(), out, resume=(out / "recipe.yaml").exists())
        code = 0
    except BaseException as error:  # noqa: BLE001  (the parent is told)
        (out.parent / "error.txt").write_text(f"{type(error).__name__}: {error}")
    finally:
        os._exit(code)


def begin(out, phase, naive):
    phase[0] = PHASES.index(STARTING)
    pid = os.fork()
    if pid == 0:
        child(out, phase, naive)
    return pid


def finished(pid):
    """The child's exit code, or ``None`` while it runs."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def until(pid, phase, wanted, *, over=False):
    """Wait until a phase begins, or is over; False if the child ended before."""
    while (phase[0] == PHASES.index(wanted)) == over:
        if finished(pid) is not None:
            return False
        time.sleep(0.0005)
    return True


def kill_once(out, phase, naive, chance, where, took):
    """One start and one kill: the phase it fell in; ``None`` if the run ended first, or its error.

    ``took`` says how long a phase lasts, STARTING how long the whole run does: that kill falls anywhere.
    """
    pid = begin(out, phase, naive)
    for later in reversed(range(chance.randint(1, 4) if where != STARTING else 1)):
        if not until(pid, phase, where) or (later and not until(pid, phase, where, over=True)):
            return ended(out)
    time.sleep(chance.uniform(0, took[where]))
    if finished(pid) is not None:
        return ended(out)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return PHASES[phase[0]], ""


def ended(out):
    problem = out.parent / "error.txt"
    return None, problem.read_text() if problem.exists() else ""


def check(out, reference):
    """What is wrong with a finished run."""
    steps = [row["global_step"] for row in told(out)]
    if steps != list(range(1, STEPS + 1)):
        return f"steps told: {steps}"
    if digest(out) != reference["digest"] or told(out) != reference["told"]:
        return "the weights or the metrics are not those of the run that was never killed"
    return ""


def warm_up(out):
    """Train once here: children then need not import, find fonts and set up kernels, each for itself."""
    train(what(), out)


def watched(pid, phase):
    """How long a step and a save of a run take that nobody kills, and all of it."""
    start = time.monotonic()
    spent = dict.fromkeys(PHASES, 0.0)
    while finished(pid) is None:
        before = time.monotonic()
        time.sleep(0.0005)
        spent[PHASES[phase[0]]] += time.monotonic() - before
    return {
        STARTING: time.monotonic() - start,
        TRAINING: spent[TRAINING] / STEPS,
        SAVING: spent[SAVING] / STEPS,
    }


def attack(folder, kills, seed, naive=False):
    """Kill runs ``kills`` times; every run is restarted until it ends, and then checked.

    A third of the kills fall at any moment, a third in or after a step, a third in a save.
    """
    chance, phase = random.Random(seed), mmap.mmap(-1, 1)
    whole = folder / "whole" / "run"
    whole.parent.mkdir(parents=True)
    warm_up(folder / "warm")
    took = watched(begin(whole, phase, naive=False), phase)
    reference = {"digest": digest(whole), "told": told(whole)}
    fallen, problems, runs = [], [], 0
    while len(fallen) < kills and not (naive and problems):
        out = folder / f"{runs}" / "run"
        out.parent.mkdir()
        runs += 1
        while len(fallen) < kills:
            aim = (STARTING, TRAINING, SAVING)[len(fallen) % 3]
            where, problem = kill_once(out, phase, naive, chance, aim, took)
            if where is None:
                break
            fallen.append(where)
        if where is not None:
            _, status = os.waitpid(begin(out, phase, naive), 0)
            problem = ended(out)[1] if status else ""
        if problem or (problem := check(out, reference)):
            problems.append(f"run {runs}, after {len(fallen)} kills: {problem}")
    return {"fallen": fallen, "problems": problems, "runs": runs}


if __name__ == "__main__":
    torch.set_num_threads(1)
    told_ = attack(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), naive="naive" in sys.argv)
    sys.stdout.write(json.dumps(told_))
