"""``torchrun -m vlmix train`` on two processes: the steps and the model of one, and either resumes."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.runs import CONVNEXT, LANGUAGE, TINY, recipe, stage, synth, told, train
from vlmix import load
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.train.parallel.pieces import Stored
from vlmix.train.recipe_file import write_recipe

pytestmark = [pytest.mark.flow, pytest.mark.slow]
# Without dropout, whose draws differ between processes; seven rows leave one process idle in the last round.
MODEL = {
    **TINY["model"],
    "language_model": {**LANGUAGE, "attention_dropout": 0.0},
    "encoders": [TINY["model"]["encoders"][0], {**CONVNEXT, "drop_path": 0.0}],
}
# AdamW divides by the size of a gradient: with the usual eps, one of rounding noise alone moves a weight.
SEVEN = {
    "batch_size": 7,
    "micro_batch_size": 2,
    "cache_features": False,
    "steps": 2,
    "optimizer": {"eps": 1e-3},
    "tell_samples": True,
}


def words(folder):
    """A source whose rows have no picture."""
    rows = [
        {
            "id": f"row{i}",
            "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "b" * i}],
        }
        for i in range(1, 12)
    ]
    (folder / "words.json").write_text(json.dumps(rows))
    return {"source": {"kind": "llava_json", "path": str(folder / "words.json"), "images": str(folder)}}


def mixed(folder, **changes):
    text = words(folder)
    align = stage("align", {"projector.*": 1e-2}, synth("caption"), text, **SEVEN)
    again = [{"kind": "reinitialise", "parameters": ["projector.*"]}]
    tune = stage("tune", {"*": 1e-2}, synth("colour"), text, **SEVEN, gradient_checkpointing=True)
    last = stage("last", {"*": 1e-2}, synth("shape"), text, **SEVEN, before=again, batching={"group": False})
    return recipe(model=MODEL, stages=[align, tune, last], **changes)


def torchrun(what, out):
    path = out.with_suffix(".yaml")
    write_recipe(path, what)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ran = subprocess.run(
        [*start, "-m", "vlmix", "train", str(path), "--out", str(out)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    train(mixed(folder), folder / "one")
    ran = torchrun(mixed(folder), folder / "two")
    assert ran.stdout.count("model ") == 1
    return folder


def same(one, other):
    for first, second in zip(told(one), told(other), strict=True):
        differ = {"loss", "grad_norm", "sample_ids"}
        exact = {name: value for name, value in first.items() if name not in differ}
        assert exact == {name: second[name] for name in exact}
        # Sums in another order: four units in the last place.
        assert second["loss"] == pytest.approx(first["loss"], abs=2e-6)


def test_two_processes_train_what_one_does(runs):
    same(runs / "one", runs / "two")
    one, two = (runs / name / "model" for name in ("one", "two"))
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    assert (one / "config.json").read_bytes() == (two / "config.json").read_bytes()
    first, second = Stored(one, "model"), Stored(two, "model")
    assert first.names == second.names
    assert max((first.read(n) - second.read(n)).abs().max().item() for n in first.names) < 1e-2
    assert isinstance(load(two)[0], VlmixForConditionalGeneration)


def test_two_processes_read_the_samples_of_one_none_twice_and_none_missing(runs):
    for first, second in zip(told(runs / "one"), told(runs / "two"), strict=True):
        (alone,), each = first["sample_ids"], second["sample_ids"]
        assert len(each) == 2
        assert all(each)
        assert len(alone) == first["samples"] == len({*alone})
        assert sorted(each[0] + each[1]) == sorted(alone)


@pytest.mark.parametrize(("begun", "world"), [("one", 2), ("two", 1), ("two", 2)])
def test_any_number_of_processes_goes_on(crew, runs, tmp_path, begun, world):
    out = tmp_path / "run"
    shutil.copytree(runs / begun, out)
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints" / "3-last-0000002")
    if world == 1:
        train(mixed(runs), out, resume=True)
    else:
        changes = {"parallel": {"kind": "ddp"}} if begun == "one" else {}
        crew.run(train, mixed(runs, **changes), out, True)
    same(runs / begun, out)
    if (begun, world) == ("two", 2):
        assert told(out) == told(runs / begun)


@pytest.mark.filterwarnings("ignore")  # torch's own compiler warns
def test_compiled_layers_train_alike(tmp_path):
    stages = [
        stage("tune", {"*": 1e-2}, synth("colour"), **SEVEN, compile=compiles) for compiles in (False, True)
    ]
    for compiles, what in enumerate(stages):
        train(recipe(model=MODEL, stages=[what]), tmp_path / str(compiles))
    plain, compiled = (told(tmp_path / name) for name in "01")
    # Kernels of its own.
    assert [r["loss"] for r in compiled] == pytest.approx([r["loss"] for r in plain], abs=1e-4)
