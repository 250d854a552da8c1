"""Averages follow their formula, spikes are told from noise, and both go on from a checkpoint."""

import random
from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import (
    get_cosine_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from vlmix.core.optimization import EmaSettings, ScheduleSettings, SpikeSettings
from vlmix.train.averaging import Averages
from vlmix.train.optim import rate_factor
from vlmix.train.spikes import SpikePolicy


@pytest.mark.parametrize("warmup", [True, False])
def test_the_average_of_weights_follows_its_formula_in_float32(warmup):
    weight = nn.Parameter(torch.randn(5).bfloat16())
    averages = Averages(EmaSettings(decay=0.5, warmup=warmup), {"w": weight})
    expected = weight.detach().double()
    for number in range(20):
        with torch.no_grad():
            weight.copy_(torch.randn(5))
        averages.update()
        decay = min(0.5, (1 + number) / (10 + number)) if warmup else 0.5
        expected = decay * expected + (1 - decay) * weight.detach().double()
    again = Averages(EmaSettings(decay=0.5, warmup=warmup), {"w": weight})
    for name, tensor in again.state().items():
        tensor.copy_(averages.state()[name])
    for each in (averages, again):
        with torch.no_grad():
            weight.copy_(torch.ones(5))
        each.update()
        assert each.state()["w"].dtype == torch.float32
    assert all(torch.equal(tensor, again.state()[name]) for name, tensor in averages.state().items())
    expected = 0.5 * expected + 0.5
    # 21 roundings of numbers about 1 in float32.
    assert torch.allclose(averages.state()["w"].double(), expected, rtol=0, atol=21 * 2**-23)
    averages.hand_on()
    assert torch.equal(weight, averages.state()["w"].bfloat16())


def test_the_average_of_weights_that_stay_is_the_closed_form():
    weight = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    averages = Averages(EmaSettings(decay=0.9, warmup=False), {"w": weight})
    with torch.no_grad():
        weight.fill_(1.0)
    for updates in range(1, 51):
        averages.update()
        # 50 roundings of numbers below 1 in float32.
        assert averages.state()["w"].tolist() == pytest.approx([1 - 0.9**updates] * 3, abs=50 * 2**-24)


def noisy(seed, count, spikes=()):
    """Losses that fall with noise, and norms with a heavier tail."""
    draw = random.Random(seed)
    for step in range(count):
        loss = 3 * 0.99**step + 0.5 + draw.gauss(0, 0.1)
        yield (10 * loss if step in spikes else loss), draw.lognormvariate(0, 0.15)


def verdicts(policy, values):
    return [policy.judge(loss, norm).action for loss, norm in values]


def test_noise_passes_and_spikes_do_not():
    settings = SpikeSettings(window=40, least=10)
    for seed in range(20):
        assert {*verdicts(SpikePolicy(settings), noisy(seed, 300))} == {"update"}
    policy = SpikePolicy(settings)
    found = verdicts(policy, noisy(0, 300, spikes=(5, 50, 51, 200)))
    assert [step for step, action in enumerate(found) if action == "skip"] == [50, 51, 200]
    assert policy.skipped == 3
    only_norm = SpikePolicy(settings.model_copy(update={"watch": ["grad_norm"], "action": "stop"}))
    assert {*verdicts(only_norm, noisy(0, 300, spikes=(50,)))} == {"update"}
    verdict = only_norm.judge(1.0, 50.0)
    assert verdict.action == "stop"
    assert verdict.reason.startswith("grad_norm 50 is above")


def test_a_new_level_is_skipped_a_few_times_and_then_stops():
    policy = SpikePolicy(SpikeSettings(window=20, least=10, in_a_row=3))
    assert {*verdicts(policy, noisy(1, 50))} == {"update"}
    assert verdicts(policy, [(40.0, 1.0)] * 4) == ["skip", "skip", "skip", "stop"]


def test_what_is_not_finite_stops_unless_it_may_be_skipped():
    for settings in (None, SpikeSettings()):
        assert SpikePolicy(settings).judge(float("nan"), 1.0).action == "stop"
    policy = SpikePolicy(SpikeSettings(non_finite="skip", in_a_row=2))
    values = [(1.0, float("inf")), (float("nan"), 1.0), (1.0, 1.0), (float("inf"), 1.0)]
    assert verdicts(policy, values) == ["skip", "skip", "update", "skip"]


def test_a_policy_goes_on_from_a_checkpoint_with_the_same_verdicts():
    settings = SpikeSettings(window=15, least=5, in_a_row=9)
    values = list(noisy(2, 120, spikes=(4, 30, 31, 32, 90)))
    whole = SpikePolicy(settings)
    expected = verdicts(whole, values)
    for cut in (0, 3, 31, 60):
        first, second = SpikePolicy(settings), SpikePolicy(settings)
        found = verdicts(first, values[:cut])
        second.load({name: tensor.clone() for name, tensor in first.state().items()})
        assert found + verdicts(second, values[cut:]) == expected
        assert all(torch.equal(second.state()[name], tensor) for name, tensor in whole.state().items())


@pytest.mark.parametrize(("decay", "middle"), [("linear", 0.55), ("cosine", 0.55), ("sqrt", 0.3636)])
def test_wsd_stays_at_the_peak_and_falls_at_the_end(decay, middle):
    settings = ScheduleSettings(kind="wsd", warmup_steps=4, decay_share=0.2, decay=decay, floor=0.1)
    rates = [rate_factor(settings, step, 100) for step in range(100)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert set(rates[4:81]) == {1.0}
    assert all(a > b for a, b in pairwise(rates[80:]))
    assert rates[90] == pytest.approx(middle, abs=1e-4)
    assert rate_factor(settings, 100, 100) == pytest.approx(0.1)
    short = ScheduleSettings(kind="wsd", warmup_steps=9, decay_share=0.5)
    assert [rate_factor(short, step, 10) for step in (8, 9)] == [1.0, 1.0]
    flat = ScheduleSettings(kind="wsd", decay_share=0.0)
    assert {rate_factor(flat, step, 50) for step in range(5, 50)} == {1.0}


PEERS = {
    "cosine": (get_cosine_schedule_with_warmup, {}),
    "linear": (get_linear_schedule_with_warmup, {}),
    "cosine floor": (get_cosine_with_min_lr_schedule_with_warmup, {"min_lr_rate": 0.1}),
    "wsd linear": (get_wsd_schedule, {"decay_type": "linear"}),
    "wsd cosine": (get_wsd_schedule, {"decay_type": "cosine"}),
    "wsd sqrt floor": (get_wsd_schedule, {"decay_type": "1-sqrt", "min_lr_ratio": 0.1}),
}


@pytest.mark.parity
@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("name", PEERS)
def test_rates_are_those_of_transformers_schedulers(name, warmup):
    """But for the warm-up: theirs begins with a step at rate 0 and ours one step later."""
    make, more = PEERS[name]
    kind, _, rest = name.partition(" ")
    settings = ScheduleSettings(
        kind=kind,
        warmup_steps=warmup,
        decay=rest.partition(" ")[0] if kind == "wsd" else "sqrt",
        floor=0.1 if "floor" in name else 0.0,
    )
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    wsd = {"num_decay_steps": 20} if kind == "wsd" else {}
    scheduler = make(optimizer, num_warmup_steps=warmup, num_training_steps=100, **wsd, **more)
    theirs = []
    for _ in range(100):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    ours = [rate_factor(settings, step, 100) for step in range(100)]
    # float64, the same operations in another order.
    assert ours[warmup:] == pytest.approx(theirs[warmup:], abs=1e-15)
    if name != "wsd sqrt floor":  # there theirs warms up from the floor
        assert ours[:warmup] == pytest.approx(theirs[1 : warmup + 1], abs=1e-15)
