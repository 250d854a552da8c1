"""A decoder with experts, divided among two processes by a recipe: what one learns, resumed by any."""

import shutil

import pytest
import torch

from tests import processes
from tests.flow.test_continual_processes import REST, same_weights
from tests.flow.test_expert_processes import pytestmark as _needs
from tests.runs import CONVNEXT, LANGUAGE, TINY, recipe, stage, synth, told, train
from vlmix.core.errors import PlanError, RecipeError
from vlmix.core.parallel import ParallelSettings
from vlmix.models.plan import shape_only
from vlmix.moe.parallel import check_experts
from vlmix.train.build import build_processor
from vlmix.train.parallel.processes import mesh_shape

pytestmark = _needs
MODEL = {
    **TINY["model"],
    "language_model": {**LANGUAGE, "attention_dropout": 0.0},
    "encoders": [TINY["model"]["encoders"][0], {**CONVNEXT, "drop_path": 0.0}],
    "experts": [{"place": "language_model", "layers": "all", "count": 4, "noise": 0.1}],
}


def what(experts=2, kind="fsdp", **model):
    stages = [
        stage("align", {"projector.*": 1e-2}, synth("caption"), **REST),
        stage("tune", {"*": 1e-2}, synth("colour"), **REST, gradient_checkpointing=True),
    ]
    return recipe(model={**MODEL, **model}, stages=stages, parallel={"kind": kind, "experts": experts})


def run_each(out, experts, kind="fsdp", resume=False):
    train(what(experts, kind), out, resume=resume)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    train(what(), out)
    return out


def same(one, other):
    # Sums in another order.
    assert [row["loss"] for row in told(other)] == pytest.approx([row["loss"] for row in told(one)], abs=1e-6)
    same_weights(one / "model", other / "model")


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_divided_experts_learn_what_whole_ones_do(crew, alone, tmp_path, kind):
    crew.run(run_each, tmp_path / "run", 2, kind)
    same(alone, tmp_path / "run")


@pytest.mark.parametrize(("begun", "world", "experts"), [("two", 1, 1), ("one", 2, 2), ("two", 2, 1)])
def test_a_run_goes_on_with_experts_divided_otherwise(crew, alone, tmp_path, begun, world, experts):
    out = tmp_path / "run"
    if begun == "two":
        crew.run(run_each, out, 2)
    else:
        shutil.copytree(alone, out)
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints" / "2-tune-0000002")
    if world == 1:
        train(what(), out, resume=True)
    else:
        crew.run(run_each, out, experts, "fsdp", True)
    same(alone, out)


def copies(out):
    """Four processes, in two groups that hold the same experts."""
    run_each(out, 2, "fsdp")


def test_groups_that_hold_the_same_experts_learn_the_same(alone, tmp_path):
    processes.run(copies, tmp_path / "run", world=4)
    same(alone, tmp_path / "run")


def test_experts_that_do_not_divide_are_refused():
    config = build_processor(what())[1]
    config.experts = MODEL["experts"]
    decoder = shape_only(config, torch.float32).model.language_model
    config.experts = None
    plain = shape_only(config, torch.float32).model.language_model
    check_experts([plain, decoder], 4)  # as before and after a stage that puts experts in
    with pytest.raises(PlanError, match="4 experts do not divide among 3 processes"):
        check_experts([plain, decoder], 3)
    with pytest.raises(PlanError, match="no stage's decoder has experts to divide"):
        check_experts([plain], 2)
    with pytest.raises(RecipeError, match="groups of 3"):
        mesh_shape(ParallelSettings(experts=3), 4)
    with pytest.raises(ValueError, match="remove `offload`"):
        ParallelSettings(experts=2, offload="cpu")
