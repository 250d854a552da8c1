"""Every registered optimizer keeps the contract; the one each is made of is the library's own."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Muon

from vlmix.core.errors import InputError, RecipeError
from vlmix.core.optimization import ScheduleSettings
from vlmix.core.parts import read_part
from vlmix.train import checkpoint
from vlmix.train.checkpoint import RunState
from vlmix.train.optim import build_optimizer, hand_on, rate_factor, set_rates
from vlmix.train.optimizers import OPTIMIZERS
from vlmix.train.trainable import select

NEEDS = {"adamw8bit": "bitsandbytes", "schedule_free": "schedulefree"}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS.names())


class Net(nn.Module):
    """A table, a convolution, matrices with and without bias, a norm."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 32)
        self.mix = nn.Conv1d(32, 32, 3, padding=1)
        self.inner = nn.Linear(32, 32, bias=False)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 11)

    def forward(self, ids):
        x_BNC = self.words(ids)
        x_BNC = x_BNC + self.mix(x_BNC.transpose(1, 2)).transpose(1, 2)
        return self.head(self.norm(self.inner(x_BNC)) * torch.rand(32))


class Session:
    """A network in training with everything a checkpoint has to keep."""

    def __init__(self, name, seed, **settings):
        pytest.importorskip(NEEDS.get(name, "torch"), reason="needs the extra `optim`")
        torch.manual_seed(seed)
        tiny = OPTIMIZERS.get(name).settings_class.tiny().model_dump()
        self.net = Net()
        self.chosen = select(self.net, {"*": 1e-2, "words.*": 1e-3})
        self.optimizer = build_optimizer(self.chosen, {**tiny, "weight_decay": 0.1, **settings}, self.net)

    def step(self, times, made=True):
        for number in range(times):
            set_rates(self.optimizer, 1 / (1 + number))
            self.optimizer.zero_grad(set_to_none=True)
            ids = torch.randint(0, 11, (4, 6))
            nn.functional.cross_entropy(self.net(ids).flatten(0, 1), ids.flatten()).backward()
            if made:
                self.optimizer.step()
        return self

    def save(self, root):
        state = RunState(
            stage="only",
            stage_index=0,
            step=3,
            steps=9,
            global_step=3,
            seed=0,
            order="x",
            ledgers={},
            versions=checkpoint.versions(),
        )
        return checkpoint.save(root, state, self.net, self.chosen.parameters, self.optimizer)

    def load(self, folder):
        checkpoint.load_weights(folder, self.net)
        checkpoint.load_optimizer(folder, self.chosen.parameters, self.optimizer)
        checkpoint.load_random_state(folder)
        return self


def weights(net):
    return {name: parameter.detach().clone() for name, parameter in net.named_parameters()}


@each_optimizer
def test_a_saved_one_goes_on_bit_for_bit_as_if_never_stopped(name, tmp_path):
    one = Session(name, 1).step(3)
    folder = one.save(tmp_path)
    one.step(3)
    hand_on(one.optimizer)
    two = Session(name, 2).load(folder).step(3)
    hand_on(two.optimizer)
    for key, weight in weights(one.net).items():
        assert torch.equal(weight, weights(two.net)[key]), key


@each_optimizer
def test_it_learns_and_decays_matrices_alone(name):
    session = Session(name, 3)
    before = weights(session.net)
    for group in session.optimizer.param_groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0)
    every = [id(p) for group in session.optimizer.param_groups for p in group["params"]]
    assert sorted(every) == sorted(map(id, session.net.parameters()))
    assert set_rates(session.optimizer, 0.5) == {"*": 5e-3, "words.*": 5e-4}
    session.step(5)
    after = weights(session.net)
    for key in before:
        moved = (after[key] - before[key]).abs().max()
        assert 0 < moved < (0.02 if key.startswith("words") else 0.2), key


@each_optimizer
def test_settings_survive_json_and_refuse_unknown_keys(name):
    settings = OPTIMIZERS.get(name).settings_class.tiny()
    raw = json.loads(json.dumps(settings.model_dump(mode="json")))
    assert read_part(OPTIMIZERS, raw) == settings
    for key in raw.keys() - {"kind"}:
        with pytest.raises(RecipeError, match=key):
            read_part(OPTIMIZERS, {**raw, key + "x": 1})


@pytest.mark.parametrize("name", sorted(NEEDS))
def test_a_missing_package_is_named_with_its_extra(name, monkeypatch):
    for module in (NEEDS[name], f"{NEEDS[name]}.optim"):
        monkeypatch.setitem(sys.modules, module, None)
    net = Net()
    with pytest.raises(InputError, match=rf"optimizer {name} needs the extra `optim`.*vlmix\[optim\]"):
        build_optimizer(select(net, {"*": 1.0}), {"kind": name}, net)


def theirs(name, parameters):
    """The library's own class over parameters that ``name`` gives to it, with the settings of a session."""
    more = {"lr": 1e-2, "weight_decay": 0.1}
    if name == "adamw":
        return AdamW(parameters, fused=True, **more)
    if name == "muon":
        return Muon(parameters, adjust_lr_fn="match_rms_adamw", **more)
    if name == "adamw8bit":
        return pytest.importorskip("bitsandbytes").optim.AdamW8bit(parameters, min_8bit_size=256, **more)
    optimizer = pytest.importorskip("schedulefree").AdamWScheduleFree(parameters, **more)
    optimizer.train()
    return optimizer


@pytest.mark.parity
@each_optimizer
def test_a_matrix_moves_as_the_librarys_own_class_moves_it(name):
    session = Session(name, 4)
    weight = nn.Parameter(session.net.inner.weight.detach().clone())
    peer = theirs(name, [weight])
    for number in range(4):
        session.step(1, made=False)
        weight.grad = session.net.inner.weight.grad.clone()
        factor = (1.0, 0.5, 1.0, 0.25)[number]
        set_rates(session.optimizer, factor)
        peer.param_groups[0]["lr"] = 1e-2 * factor
        session.optimizer.step()
        peer.step()
        assert torch.equal(weight, session.net.inner.weight)
    hand_on(session.optimizer)
    hand_on(peer)
    assert torch.equal(weight, session.net.inner.weight)
    if name == "adamw8bit":
        assert session.optimizer.state[session.net.inner.weight]["state1"].dtype == torch.uint8
        assert session.optimizer.state[session.net.words.weight]["exp_avg"].dtype == torch.float32


@pytest.mark.parity
def test_schedule_free_warms_up_as_the_authors_own_warm_up():
    authors = pytest.importorskip("schedulefree")
    session = Session("schedule_free", 8)
    inner = session.net.inner.weight
    weight = nn.Parameter(inner.detach().clone())
    peer = authors.AdamWScheduleFree([weight], lr=1e-2, weight_decay=0.1, warmup_steps=4)
    peer.train()
    schedule = ScheduleSettings(kind="constant", warmup_steps=4)
    for step in range(9):
        weight.grad = torch.randn_like(weight)
        inner.grad = weight.grad.clone()
        set_rates(session.optimizer, rate_factor(schedule, step, 9))
        session.optimizer.step()
        peer.step()
    hand_on(session.optimizer)
    hand_on(peer)
    assert torch.equal(weight, inner)


def test_momentum_beside_adamw_is_refused_with_the_remedy():
    """Recipes written when AdamW and Muon had one set of settings hold it."""
    with pytest.raises(RecipeError, match=r"`momentum` is Muon's.*Remove it.*kind: muon"):
        read_part(OPTIMIZERS, {"kind": "adamw", "momentum": 0.95})


def test_fused_adamw_moves_as_the_plain_one_but_for_the_last_bits():
    fused, plain = Session("adamw", 5), Session("adamw", 5, fused=False)
    assert {group["fused"] for group in fused.optimizer.param_groups} == {True}
    for session in (fused, plain):
        torch.manual_seed(6)
        session.step(3)
    for key, weight in weights(fused.net).items():
        # Updates are about 1e-2 and rounded in another order: 1e-2 * 2**-23, and what follows from it.
        assert torch.allclose(weight, weights(plain.net)[key], rtol=0, atol=1e-6), key
