"""What another number of processes takes up from a checkpoint is what was saved, bit for bit."""

import shutil
from unittest import mock

import pytest

from tests.flow.test_parallel_combinations import EPS, go, what
from tests.runs import train
from vlmix.train.loop import StageLoop
from vlmix.train.parallel.pieces import Stored

pytestmark = [pytest.mark.flow, pytest.mark.slow]
SAVED = "1-only-0000002"
# Everything a checkpoint can hold: moments, momentum, averages, a window of losses, 4-bit weights.
LEARNING = {
    "adamw": {"ema": {"decay": 0.9}, "spikes": {}},
    "muon": {"optimizer": {"kind": "muon", **EPS}, "ema": {"decay": 0.9}},
    "qlora": {
        "model": {"adapters": [{"match": ["language_model.*"], "rank": 2, "alpha": 4, "quantise": "nf4"}]},
        "train": {"*lora_*": 1e-2, "projector.*": 1e-2},
    },
}


def save_again(given, out):
    """Resume and, in place of the next step, write the checkpoint once more."""
    with mock.patch.object(StageLoop, "run", lambda self, done, after_step: after_step(done)):
        train(given, out, resume=True)


def begun(crew, folder, world, given):
    """A run of which a checkpoint after two of three steps is left."""
    out = folder / f"begun-{world}"
    if world == 1:
        go(given, out)
    else:
        crew.run(go, given, out)
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints" / "1-only-0000003")
    return out


def same_bits(one, other, stem):
    first, second = Stored(one, stem), Stored(other, stem)
    assert first.names == second.names
    for name in first.names:
        a, b = first.read(name), second.read(name)
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.numpy().tobytes() == b.numpy().tobytes(), (stem, name)
    return len(first.names)


@pytest.mark.parametrize("learning", LEARNING)
def test_what_is_taken_up_is_what_was_saved_bit_for_bit(crew, tmp_path, learning):
    changes = {**LEARNING[learning], "save_every_steps": 1}
    given = what(tmp_path, **changes)
    sources = {world: begun(crew, tmp_path, world, given) for world in (1, 2)}
    for number, (source, world, kind) in enumerate(
        ((2, 1, "fsdp"), (1, 2, "fsdp"), (2, 2, "fsdp"), (2, 2, "ddp"), (1, 2, "ddp"))
    ):
        out = tmp_path / str(number)
        shutil.copytree(sources[source], out)
        given = what(tmp_path, **changes, parallel={"kind": kind})
        if world == 1:
            save_again(given, out)
        else:
            crew.run(save_again, given, out)
        saved, again = sources[source] / "checkpoints" / SAVED, out / "checkpoints" / SAVED
        files = [*again.glob("model*.safetensors")]
        assert len(files) == world
        stems = {path.name.removesuffix(".safetensors").split("-")[0] for path in saved.glob("*.safetensors")}
        assert stems >= ({"model", "optimizer", "ema"} if learning != "qlora" else {"model", "optimizer"})
        for stem in stems - {"rng"}:
            assert same_bits(saved, again, stem)
        if source == world:
            for path in saved.glob("rng*.safetensors"):
                assert path.read_bytes() == (again / path.name).read_bytes()
