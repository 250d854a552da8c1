"""The compat router against the gates of DeepSpeed 0.9.5, all recorded settings, with their noise."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from safetensors.torch import load_file

from tests.parity.published import GOLDENS
from vlmix.core.experts import BalanceSettings
from vlmix.moe.balance import balance_loss
from vlmix.moe.routers.deepspeed095 import Deepspeed095Router, Deepspeed095Settings, slots

NAME = "modules-deepspeed-gating"
FOLDER = GOLDENS / NAME
CASES = json.loads((FOLDER / "cases.json").read_text(encoding="utf-8")) if FOLDER.is_dir() else []
pytestmark = [
    pytest.mark.parity,
    pytest.mark.golden,
    pytest.mark.skipif(not FOLDER.is_dir(), reason="the shared golden folders are absent"),
]
BALANCE = BalanceSettings(switch=1.0, choices="first", padding="counted")


@cache
def tensors(which):
    return load_file(FOLDER / f"{which}.safetensors")


def gate(case):
    """A router whose logits are what it reads, with the recorded noise."""
    taken = ("k", "capacity_factor", "min_capacity", "drop_tokens", "noisy_gate_policy")
    router = Deepspeed095Router(
        Deepspeed095Settings(**{key: case[key] for key in taken}), *2 * [case["experts"]]
    )
    torch.nn.init.eye_(router.gate.weight)
    size = f"t{case['tokens']}_e{case['experts']}"
    router.noise = lambda kind, _: tensors("inputs")[f"{kind}.{size}"]
    return router.train(), tensors("inputs")[f"logits.{size}"].clone().requires_grad_()


def by_slot(routing, places):
    """DeepSpeed's layout: the weight of each token, expert and place."""
    combine = torch.zeros(len(routing.logits), routing.experts, places)
    token, choice = routing.kept.nonzero(as_tuple=True)
    where = token, routing.indices[token, choice], slots(routing)[token, choice]
    return combine.index_put(where, routing.weights[token, choice])


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_gates_are_deepspeeds(case, agree):
    router, logits = gate(case)
    # As one batch of two rows where that can be: rows compete as in the original, which flattens them.
    routing = router(logits.view(2 if case["tokens"] % 2 == 0 else 1, -1, case["experts"]))
    golden = {
        what: tensors("outputs")[f"{case['name']}.{what}"]
        for what in ("combine", "exp_counts", "l_aux", "grad_logits")
    }
    counts = routing.indices[:, 0].bincount(minlength=routing.experts)
    assert torch.equal(counts, golden["exp_counts"])
    places = router.capacity(case["tokens"]) if case["drop_tokens"] else counts.max().item()
    combine, balance = by_slot(routing, places), balance_loss([routing], BALANCE)
    agree(NAME, f"{case['name']}.combine", combine, golden["combine"])
    agree(NAME, f"{case['name']}.l_aux", balance, golden["l_aux"])
    (balance + (combine.sum(2) * logits.detach().cos()).sum()).backward()
    agree(NAME, f"{case['name']}.grad_logits", logits.grad, golden["grad_logits"])
    assert not routing.weights[~routing.kept].any()


def test_the_recorded_settings_drop_tokens_and_sample_choices():
    """What the comparison above would miss if it never happened."""
    found = {case["name"]: gate(case)[0](gate(case)[1].detach()[None]) for case in CASES}
    dropped = [name for name, routing in found.items() if not routing.kept.all()]
    assert len(dropped) >= 12
    sampled = [
        r for r in found.values() if (r.indices != r.probabilities.topk(r.indices.shape[1]).indices).any()
    ]
    assert len(sampled) >= 12


MODEL = "moe-llava-stablelm-top2"


@pytest.mark.skipif(not (GOLDENS / MODEL).is_dir(), reason="the shared golden folders are absent")
@pytest.mark.parametrize("layer", ["layer0", "layer2"])
@pytest.mark.parametrize("mode", ["train", "train_nonoise", "eval", "eval_nonoise"])
def test_capacity_and_places_are_those_of_a_whole_model(mode, layer, agree):
    """Given its router's logits; ``no noise`` makes the second choice the best of the others."""
    moe = json.loads((GOLDENS / MODEL / "config.json").read_text(encoding="utf-8"))["moe"]
    kept = ("capacity_factor", "eval_capacity_factor", "min_capacity")
    second = "best" if mode.endswith("nonoise") else "sampled"
    settings = Deepspeed095Settings(**{key: moe[key] for key in kept}, k=moe["top_k_experts"], second=second)
    inputs, outputs = (load_file(GOLDENS / MODEL / f"{which}.safetensors") for which in ("inputs", "outputs"))
    golden = {
        key: outputs[f"{mode}.{layer}.{key}"]
        for key in ("router_logits", "capacity", "slot_se", "combine_se")
    }
    tokens, experts = golden["router_logits"].shape
    router = Deepspeed095Router(settings, experts, experts).train(mode.startswith("train"))
    torch.nn.init.eye_(router.gate.weight)
    router.noise = lambda kind, _: inputs[f"{kind}.{mode}.{layer}"]
    routing = router(golden["router_logits"].view(2, -1, experts))
    assert router.capacity(tokens) == golden["capacity"]
    nowhere = torch.full((tokens, experts), -1)
    assert torch.equal(nowhere.scatter(1, routing.indices, slots(routing)), golden["slot_se"])
    combined = torch.zeros(tokens, experts).scatter(1, routing.indices, routing.weights)
    agree(MODEL, f"{mode}.{layer}.combine_se", combined.detach(), golden["combine_se"])
