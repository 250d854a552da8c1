"""Tasks in turn on two processes: every method learns what it learns on one, and either may go on."""

import shutil

import pytest
from safetensors.torch import load_file

from tests.flow.test_continual_runs import METHODS, of
from tests.runs import CONVNEXT, LANGUAGE, TINY, recipe, stage, synth, told, train

pytestmark = [pytest.mark.flow, pytest.mark.slow]
# Without dropout, whose draws differ between processes; the last round of a step leaves one process idle.
MODEL = {
    **TINY["model"],
    "language_model": {**LANGUAGE, "attention_dropout": 0.0},
    "encoders": [TINY["model"]["encoders"][0], {**CONVNEXT, "drop_path": 0.0}],
}
# AdamW divides by the size of a gradient: with the usual eps, one of rounding noise alone moves a weight.
REST = {"batch_size": 5, "micro_batch_size": 1, "steps": 2, "optimizer": {"eps": 1e-3}, "save_every_steps": 1}
WORDS = {"projector.*": 1e-2, "language_model.*": 1e-2}
LAYOUTS = {
    "fsdp": {},
    "ddp": {"kind": "ddp"},
    "gathered": {"reshard_after_forward": False, "reduce": "every"},
}


def tasks(method, layout="fsdp"):
    listed = [
        stage("align", {"projector.*": 1e-2}, synth("caption"), **REST),
        {**stage("first", WORDS, synth("colour"), **REST), "task": "colours", "publish": True},
        {**stage("second", {**WORDS, "encoders.*": 1e-2}, synth("count"), **REST), "task": "digits"},
    ]
    return recipe(model=MODEL, stages=listed, continual=method, parallel=LAYOUTS[layout])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Each method's run on one process, made when it is asked for."""
    folder, made = tmp_path_factory.mktemp("alone"), {}

    def run(method):
        name = method["kind"]
        if name not in made:
            made[name] = folder / name
            train(tasks(method), made[name])
        return made[name]

    return run


def same(one, other):
    losses, others = ([row["loss"] for row in told(run)] for run in (one, other))
    assert others == pytest.approx(losses, abs=1e-6, rel=1e-6)  # sums in another order
    for name in ("models/first", "model"):
        same_weights(one / name, other / name)


def same_weights(one, other):
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        far = (second[key] - tensor).norm() / tensor.norm().clamp_min(1e-3)
        assert far < 1e-5, (key, far)


def run_each(method, layout, out, resume=False):
    train(tasks(method, layout), out, resume=resume)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS, ids=lambda raw: raw["kind"])
def test_two_processes_learn_tasks_as_one_does(crew, alone, tmp_path, method, layout):
    if layout == "gathered" and method["kind"] not in {"ewc", "lwf", "msgm"}:
        pytest.skip("what it adds to the loop is in one of the others")
    crew.run(run_each, method, layout, tmp_path / "run")
    same(alone(method), tmp_path / "run")


@pytest.mark.parametrize("kind", ["ewc", "msgm", "lwf"])
@pytest.mark.parametrize("world", [1, 2])
def test_a_run_goes_on_inside_a_task_on_another_number_of_processes(crew, alone, tmp_path, kind, world):
    method, out = of(kind), tmp_path / "run"
    if world == 1:
        crew.run(run_each, method, "fsdp", out)
    else:
        shutil.copytree(alone(method), out)
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints" / "3-second-0000002")
    if world == 1:
        train(tasks(method), out, resume=True)
    else:
        crew.run(run_each, method, "fsdp", out, True)
    same(alone(method), out)
