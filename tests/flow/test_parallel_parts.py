"""Two gloo processes on one model: the same gradients as one, checkpoints either can go on from, faults."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests import processes
from tests.tiny import PLACEHOLDER, config
from vlmix.core.errors import CheckpointError, DiskFullError, RecipeError, VlmixError
from vlmix.core.parallel import ParallelSettings
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.models.plan import shape_only
from vlmix.train import checkpoint
from vlmix.train.checkpoint import RunState
from vlmix.train.parallel.memory import compute_buffers, give_memory
from vlmix.train.parallel.pieces import Stored
from vlmix.train.parallel.processes import joined, mesh_shape
from vlmix.train.parallel.sharding import memory_bytes, total_norm

pytestmark = [pytest.mark.flow, pytest.mark.slow]
ROWS, TEXT = 4, 6


def rows(model):
    generator, seen = torch.Generator().manual_seed(1), model.model.image_seq_length
    words = torch.randint(4, PLACEHOLDER, (ROWS, TEXT), generator=generator)
    ids = torch.cat((torch.full((ROWS, seen), PLACEHOLDER), words), 1)
    pixels = torch.randint(0, 256, (ROWS, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return {"input_ids": ids, "labels": ids.masked_fill(ids == PLACEHOLDER, -100), "pixel_values": pixels}


def steps(model, optimizer, team, count):
    """Losses and gradient norms; every process takes every ``world``-th row, one a micro-batch."""
    data, found, mine = rows(model), [], range(team.rank, ROWS, team.world)
    for _ in range(count):
        optimizer.zero_grad()
        loss = torch.zeros(())
        for row in mine:
            team.last_backward(model, row == mine[-1])
            one = {name: value[row : row + 1] for name, value in data.items()}
            added = model(**one, num_items_in_batch=ROWS * TEXT, use_cache=False).loss
            added.backward()
            loss += added.detach()
        norm = total_norm([p.grad for p in model.parameters() if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), 0.5, norm)
        optimizer.step()
        found.append((team.sum(loss).item(), norm.item()))
    return found


def save(folder, step, model, optimizer, team):
    state = RunState(
        stage="a",
        stage_index=0,
        step=step,
        steps=9,
        global_step=step,
        seed=0,
        order="",
        ledgers={},
        versions={},
    )
    return checkpoint.save(folder, state, model, dict(model.named_parameters()), optimizer, team)


def begin(folder, how, checkpointing=False):
    """Two steps, a checkpoint, a third step and another checkpoint; the first encoder is frozen."""
    with joined(ParallelSettings(**how)) as team:
        torch.manual_seed(0)
        model = VlmixForConditionalGeneration(config()).train()
        model.model.encoders[0].requires_grad_(False)
        model._set_gradient_checkpointing(checkpointing)
        team.prepare(model)
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
        found = steps(model, optimizer, team, 2)
        save(folder / "a", 2, model, optimizer, team)
        found += steps(model, optimizer, team, 1)
        save(folder / "b", 3, model, optimizer, team)
        held = memory_bytes(model) / sum(p.numel() * p.element_size() for p in model.parameters())
        if team.is_main:
            (folder / "found.json").write_text(json.dumps({"found": found, "held": held}))


def go_on(folder, source, how):
    """The third step again, from the first checkpoint; no process ever has the whole model."""
    with joined(ParallelSettings(**how)) as team:
        model = shape_only(config(), torch.float32).train()
        model.model.encoders[0].requires_grad_(False)
        team.prepare(model)
        give_memory(model, team.memory)
        checkpoint.load_weights(source, model)
        compute_buffers(model)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
        checkpoint.load_optimizer(source, trained, optimizer)
        checkpoint.load_random_state(source, team)
        found = steps(model, optimizer, team, 1)
        save(folder / "b", 3, model, optimizer, team)
        if team.is_main:
            (folder / "found.json").write_text(json.dumps({"found": found}))


def told(folder):
    return json.loads((folder / "found.json").read_text())


def difference(one, other, stem):
    first, second = Stored(one, stem), Stored(other, stem)
    assert first.names == second.names
    return max((first.read(name) - second.read(name)).abs().max().item() for name in first.names)


def folder_of(path, name):
    folder = path / name
    folder.mkdir()
    return folder


A, B = "a/1-a-0000002", "b/1-a-0000003"
LAYOUTS = {
    "divided": ({}, 2, 0.55),
    "copied": ({"kind": "ddp"}, 2, 1.0),
    "offloaded": ({"offload": "cpu", "reduce": "every", "reshard_after_forward": False}, 2, 0.55),
    "hybrid": ({"shard": 2}, 4, 0.55),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    begin(folder, {})
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_processes_learn_what_one_does(crew, alone, tmp_path, layout):
    how, world, most = LAYOUTS[layout]
    given = begin, tmp_path, how, layout == "divided"
    crew.run(*given) if world == crew.world else processes.run(*given, world=world)
    found = told(tmp_path)
    # Sums in another order, and what AdamW makes of that.
    assert torch.allclose(
        torch.tensor(found["found"]), torch.tensor(told(alone)["found"]), atol=1e-6, rtol=1e-6
    )
    assert difference(alone / A, tmp_path / A, "model") < 1e-4
    assert found["held"] <= most


def test_checkpoints_serve_any_number_of_processes(crew, alone, tmp_path):
    pair = folder_of(tmp_path, "pair")
    crew.run(begin, pair, {})
    for name, source, world, exact in (
        ("pair to one", pair, 1, False),
        ("one to pair", alone, 2, False),
        ("pair to pair", pair, 2, True),
    ):
        out = folder_of(tmp_path, name)
        if world == 1:
            go_on(out, source / A, {})
        else:
            crew.run(go_on, out, source / A, {})
        for stem in ("model", "optimizer"):
            far = difference(out / B, source / B, stem)
            assert far == 0 if exact else far < 1e-4, (name, stem)
        loss = told(source)["found"][2][0]
        assert told(out)["found"][0][0] == pytest.approx(loss, abs=1e-6)
    names = sorted(path.name for path in (pair / A).iterdir())
    assert len([name for name in names if name.endswith("-of-00002.safetensors")]) == 6
    (pair / A / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="all files"):
        Stored(pair / A, "model")


def big(folder):
    """Fill a large model from a checkpoint, and tell this process's peak of memory above where it began."""
    with joined(ParallelSettings()) as team:
        with torch.device("meta"):
            model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(64)))
        team.prepare(model)
        before = resident("VmRSS")
        give_memory(model, team.memory)
        checkpoint.load_weights(folder, model)
        (folder / f"peak-{team.rank}").write_text(str(resident("VmHWM") - before))


def resident(what):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(what)))


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak of memory is read from /proc")
def test_a_process_reads_its_share_of_a_checkpoint_and_no_more(tmp_path):
    save_file(
        {f"{i}.weight": torch.full((1024, 1024), float(i)) for i in range(64)}, tmp_path / "model.safetensors"
    )
    processes.run(big, tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    for rank in range(2):
        # Half of it twice: in the process's own memory, and as pages of the file that it read.
        assert int((tmp_path / f"peak-{rank}").read_text()) < 0.8 * size + 2**26


def waiting(folder, how):
    with joined(ParallelSettings(**how)) as team:
        (folder / str(team.rank)).write_text(str(os.getpid()))
        while True:
            team.barrier()
            time.sleep(0.05)


def ended(context, seconds):
    """The exit codes of processes that end by themselves within so many seconds."""
    last = time.monotonic() + seconds
    while any(process.is_alive() for process in context.processes) and time.monotonic() < last:
        time.sleep(0.05)
    codes = [process.exitcode for process in context.processes]
    for process in context.processes:
        process.kill()
    return codes


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_is_gone_or_silent_ends_the_others(tmp_path, fault):
    context = processes.start(waiting, tmp_path, {"timeout_s": 3.0})
    while not all((tmp_path / str(rank)).is_file() for rank in range(2)):
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(context.processes[1].pid, fault)
    started = time.monotonic()
    while context.processes[0].is_alive() and time.monotonic() - started < 60:
        time.sleep(0.05)
    took = time.monotonic() - started
    codes = ended(context, 0)
    assert codes[0] == 1
    # The time-out, a beat, and room for a busy machine.
    assert took < (30 if fault == signal.SIGSTOP else 20)


def failing(folder):
    with joined(ParallelSettings()) as team:
        try:
            with team.together("saving"):
                if team.rank == 1:
                    raise DiskFullError("full")
        except VlmixError as error:
            (folder / str(team.rank)).write_text(f"{type(error).__name__}: {error}")
        assert team.gather("ä" * team.rank) == ["", "ä"]
        assert team.share(f"from {team.rank}") == "from 0"
        assert team.any(team.rank == 1)


def test_what_fails_on_one_process_fails_on_all_in_the_same_way(tmp_path):
    processes.run(failing, tmp_path)
    assert (tmp_path / "1").read_text() == "DiskFullError: full"
    assert (tmp_path / "0").read_text().startswith("DiskFullError: saving failed on another process")


def test_layouts_that_do_not_divide_are_refused():
    assert mesh_shape(ParallelSettings(shard=2), 6) == (3, 2)
    assert mesh_shape(ParallelSettings(), 6) == (6,)
    assert mesh_shape(ParallelSettings(kind="ddp"), 6) == (6, 1)
    with pytest.raises(RecipeError, match="groups of 4"):
        mesh_shape(ParallelSettings(shard=4), 6)
    with pytest.raises(ValueError, match="divides nothing"):
        ParallelSettings(kind="ddp", shard=2)
