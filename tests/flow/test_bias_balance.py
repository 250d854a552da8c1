"""Biases that balance experts: once a step, by all its micro-batches, and on where a run stopped."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.runs import LANGUAGE, TINY, digest, recipe, stage, synth, told, train

pytestmark = pytest.mark.flow
EYE = {"kind": "clip", "image_size": 48, "patch_size": 24, "width": 8, "layers": 1, "heads": 2, "mlp": 16}
RATE = 0.01
EXPERTS = {
    "layers": "all",
    "count": 4,
    "router": {"kind": "sigmoid"},
    "balance": {"switch": 0, "bias_rate": RATE},
}


def biased(steps, train=None, **more):
    """Nothing in it is random, so that the division into micro-batches changes no choice."""
    model = {
        **TINY["model"],
        "encoders": [{**EYE, "feature_layer": -1}],
        "fusion": {"kind": "single"},
        "language_model": {**LANGUAGE, "attention_dropout": 0.0},
        "experts": [EXPERTS],
    }
    only = stage("only", train or {"*": 1e-2}, synth("colour"), steps=steps, save_every_steps=3, **more)
    return recipe(model=model, stages=[only])


def biases(folder):
    """By layer, in units of the rate."""
    tensors = load_file(folder / "model.safetensors")
    return {name: tensor / RATE for name, tensor in tensors.items() if name.endswith("choice_bias")}


def test_biases_move_once_a_step_and_go_on_where_they_were(tmp_path):
    train(biased(5), tmp_path / "whole")
    found = biases(tmp_path / "whole" / "model")
    assert len(found) == 2
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "model")
    last = "1-only-0000005"
    shutil.rmtree(tmp_path / "again" / "checkpoints" / last)
    assert any(bias.any() for bias in biases(tmp_path / "again/checkpoints/1-only-0000003").values())
    train(biased(5), tmp_path / "again", resume=True)
    assert digest(tmp_path / "again/checkpoints" / last) == digest(tmp_path / "whole/checkpoints" / last)
    assert told(tmp_path / "again") == told(tmp_path / "whole")


def test_micro_batches_of_any_size_move_them_alike_and_frozen_routers_not_at_all(tmp_path):
    for size in (4, 1):
        train(biased(1, micro_batch_size=size), tmp_path / str(size))
    one, many = (biases(tmp_path / size / "model") for size in ("4", "1"))
    for name, bias in one.items():
        assert bias.abs().max() <= 2, "one step of the rate, less the mean"
        assert bias.any()
        torch.testing.assert_close(many[name], bias)
    train(biased(1, {"projector.*": 1e-2}), tmp_path / "frozen")
    assert not any(bias.any() for bias in biases(tmp_path / "frozen" / "model").values())
