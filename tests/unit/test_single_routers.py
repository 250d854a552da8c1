"""What is particular to one router."""

from __future__ import annotations

import pytest
import torch

from vlmix.core.errors import PlanError
from vlmix.core.experts import BalanceSettings
from vlmix.moe.balance import balance_loss
from vlmix.moe.routers.deepspeed095 import Deepspeed095Router, Deepspeed095Settings, slots
from vlmix.moe.routers.expert_choice import ExpertChoiceRouter, ExpertChoiceSettings
from vlmix.moe.routers.instance import InstanceRouter, InstanceSettings
from vlmix.moe.routers.sigmoid import SigmoidRouter, SigmoidSettings
from vlmix.moe.routers.soft import SoftRouter, SoftSettings

WIDTH, EXPERTS = 12, 4


def made(cls, settings, width=WIDTH):
    torch.manual_seed(3)
    part = cls(settings, width, EXPERTS)
    with torch.no_grad():
        part.reset()
        for parameter in part.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    return part.eval()


def transparent(settings):
    """A gate whose logits are what it reads."""
    router = made(Deepspeed095Router, settings, EXPERTS)
    torch.nn.init.eye_(router.gate.weight)
    return router


def tokens(rows=3, count=10, width=WIDTH):
    return torch.randn(rows, count, width, generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (SigmoidRouter, SigmoidSettings(groups=3), "4 experts are no 3 groups"),
        (SigmoidRouter, SigmoidSettings(groups=2, groups_kept=3), "3 of 2 groups"),
        (SigmoidRouter, SigmoidSettings(k=3, groups=2), "3 experts cannot be chosen from 2"),
        (ExpertChoiceRouter, ExpertChoiceSettings(capacity=4.5), "4.5 experts a token, and there are 4"),
        (InstanceRouter, InstanceSettings(k=2, gradient="gumbel"), "gradient: switch"),
        (InstanceRouter, InstanceSettings(k=5), "5 experts cannot be chosen from 4"),
    ],
)
def test_settings_that_cannot_work_are_refused(cls, settings, message):
    with pytest.raises(PlanError, match=message):
        cls.plan(settings, EXPERTS)


def test_groups_of_one_expert_are_ranked_by_it():
    settings = SigmoidSettings(k=2, groups=EXPERTS, groups_kept=2)
    alone = made(SigmoidRouter, SigmoidSettings(k=2))
    assert torch.equal(made(SigmoidRouter, settings)(tokens()).indices, alone(tokens()).indices)


def test_a_bias_moves_by_the_rate_and_keeps_its_mean():
    router = made(SigmoidRouter, SigmoidSettings())
    router.rebalance(torch.tensor([7, 1, 2, 2]), 0.1)
    torch.testing.assert_close(router.choice_bias, torch.tensor([-0.15, 0.05, 0.05, 0.05]))


@pytest.mark.parametrize(("capacity", "taken"), [(2.0, 5), (1.0, 3), (0.01, 1), (4.0, 10)])
def test_every_expert_chooses_as_many_tokens_of_every_row(capacity, taken):
    router = made(ExpertChoiceRouter, ExpertChoiceSettings(capacity=capacity))
    routing = router(tokens())
    shares = routing.probabilities.view(3, 10, EXPERTS)
    chosen = torch.zeros(3, 10, EXPERTS)
    for row, expert, weight in zip(routing.rows, routing.indices[:, 0], routing.weights[:, 0], strict=True):
        chosen[row // 10, row % 10, expert] += 1
        assert weight == shares[row // 10, row % 10, expert]
    assert chosen.max() == 1
    assert (chosen.sum(1) == taken).all()
    worst = torch.where(chosen.bool(), shares, 2.0).amin(1)
    best_left = torch.where(chosen.bool(), -1.0, shares).amax(1)
    assert (worst >= best_left).all()
    even = BalanceSettings(switch=1.0)
    torch.testing.assert_close(balance_loss([routing], even), torch.tensor(1.0))


def test_soft_slots_are_averages_of_a_rows_tokens():
    """Written out for one row, as the paper has it."""
    router, x = made(SoftRouter, SoftSettings(slots=2)), tokens()
    routing = router(x)
    directions = router.gate.weight / router.gate.weight.norm(dim=1, keepdim=True)
    scores = router.scale * (x[1] / x[1].norm(dim=1, keepdim=True)) @ directions.T
    torch.testing.assert_close(routing.mixing.dispatch[1], scores.softmax(0).T)
    torch.testing.assert_close(routing.mixing.combine[1], scores.softmax(1))
    assert routing.indices.view(3, -1).tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]] * 3
    torch.testing.assert_close(routing.logits.softmax(-1), routing.probabilities)
    torch.testing.assert_close(routing.probabilities[10:20, 1], scores.softmax(1)[:, 2:4].sum(1))


def test_an_instance_router_mixes_all_experts_or_switches_one():
    mixture = made(InstanceRouter, InstanceSettings(k=EXPERTS))(tokens(count=1))
    shares = torch.zeros(3, EXPERTS).scatter(1, mixture.indices, mixture.weights)
    torch.testing.assert_close(shares, mixture.probabilities)
    one = made(InstanceRouter, InstanceSettings())(tokens(count=1))
    assert torch.equal(one.weights[:, 0], one.probabilities.amax(1))


@pytest.mark.parametrize("gradient", ["straight_through", "gumbel"])
def test_weights_of_one_have_the_gradient_of_the_probability(gradient):
    part = made(InstanceRouter, InstanceSettings(gradient=gradient, temperature=0.7))
    routing = part(tokens(count=1))
    assert torch.equal(routing.weights, torch.ones(3, 1))
    assert torch.equal(routing.indices[:, 0], routing.probabilities.argmax(1))
    pull = torch.randn(3, 1)
    found = torch.autograd.grad((routing.weights * pull).sum(), part.gate.weight, retain_graph=True)[0]
    chosen = routing.probabilities.gather(1, routing.indices)
    torch.testing.assert_close(found, torch.autograd.grad((chosen * pull).sum(), part.gate.weight)[0])


def test_gumbel_samples_in_training_alone():
    part = made(InstanceRouter, InstanceSettings(gradient="gumbel")).train()
    x = tokens(rows=1, count=1).expand(4000, 1, WIDTH)
    routing = part(x)
    found = routing.indices.flatten().bincount(minlength=EXPERTS) / 4000
    # Three standard errors of a share of 4000 draws are at most 0.024.
    torch.testing.assert_close(found, routing.probabilities[0], rtol=0, atol=0.03)
    assert part.eval()(x).indices.unique().numel() == 1


def test_the_second_expert_is_a_sample_from_the_softmax_over_the_others():
    logits = torch.tensor([1.0, 0.5, 0.0, -1.0])
    expected = logits[1:].softmax(0)
    router = transparent(Deepspeed095Settings(capacity_factor=9, eval_capacity_factor=9))
    for training in (True, False):
        # In evaluation the scores are part of the seed, so each is moved a little.
        x = (logits + torch.linspace(0, 1e-3, 8000)[:, None]).view(8, 1000, EXPERTS)
        second = torch.cat([router.train(training)(row[None]).indices[:, 1] for row in x])
        found = second.bincount(minlength=EXPERTS)[1:] / 8000
        # Three standard errors of a share of 8000 draws are at most 0.017.
        torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


def test_evaluation_repeats_itself_and_neither_layers_nor_steps_share_their_noise():
    router, x = transparent(Deepspeed095Settings()), tokens(1, 64, EXPERTS)
    first = router(x).indices
    torch.rand(5)
    assert torch.equal(router(x).indices, first)
    noise = [router.noise("gumbel", scores) for scores in (x[0], x[0] + 1, x[0] * 2)]
    assert all(not torch.equal(noise[i], noise[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    other = transparent(Deepspeed095Settings(seed=1))
    assert not torch.equal(other(x).indices, first)
    state = torch.get_rng_state()
    router(x)
    assert torch.equal(torch.get_rng_state(), state), "evaluation draws from a generator of its own"


def test_capacity_counts_both_choices_and_has_a_factor_for_evaluation():
    settings = Deepspeed095Settings(capacity_factor=1.0, eval_capacity_factor=2.0, min_capacity=4)
    router = transparent(settings)
    assert [router.capacity(count) for count in (1, 9, 10)] == [4, 9, 10]
    assert [router.train().capacity(count) for count in (1, 9, 10)] == [4, 5, 5]


def test_first_choices_get_their_places_before_second_ones_of_earlier_tokens():
    """Two places an expert; three tokens want expert 0 first, one of them wants expert 1 second."""
    x = torch.tensor([[9.0, 5, 0, 0], [9, 0, 5, 0], [9, 0, 5, 0], [5, 9, 0, 0]])[None]
    router = transparent(Deepspeed095Settings(second="best", eval_capacity_factor=1.0))
    routing = router(x)
    assert router.capacity(4) == 2
    assert routing.indices.tolist() == [[0, 1], [0, 2], [0, 2], [1, 0]]
    assert routing.kept.tolist() == [[True, True], [True, True], [False, True], [True, False]]
    assert slots(routing).tolist() == [[0, 1], [1, 0], [-1, 1], [0, -1]]
    assert routing.weights[2].tolist() == [0, 1]
    assert routing.weights[3].tolist() == [1, 0]


@pytest.mark.parametrize("lots", [True, False])
def test_one_choice_keeps_its_probability_and_places_go_by_lot_or_by_position(lots):
    x = torch.zeros(1, 40, EXPERTS)
    x[..., 2] = torch.linspace(2, 3, 40)
    settings = Deepspeed095Settings(k=1, eval_capacity_factor=1.0, random_tokens=lots)
    routing = transparent(settings)(x)
    kept = routing.kept[:, 0]
    assert kept.sum() == 10
    assert bool(kept[:10].all()) != lots
    assert torch.equal(routing.weights[kept, 0], routing.probabilities[kept, 2])
    assert sorted(slots(routing)[kept, 0].tolist()) == list(range(10))
    everything = transparent(settings.changed(drop_tokens=False))(x)
    assert everything.kept.all()


def test_more_places_than_tokens_are_no_error():
    """The original's top-1 fails there."""
    assert transparent(Deepspeed095Settings(k=1, eval_capacity_factor=8.0))(tokens(1, 3, EXPERTS)).kept.all()


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("experts", [2, 5])
def test_one_place_an_expert_leaves_no_trace_of_the_others(k, experts):
    """Nearly all tokens lose all their choices; what they weigh is 0, and so is their gradient, not 0 / 0."""
    settings = Deepspeed095Settings(k=k, capacity_factor=1e-6, eval_capacity_factor=1e-6, min_capacity=1)
    router = Deepspeed095Router(settings, WIDTH, experts)
    router.reset()
    x = tokens().requires_grad_()
    routing = router.train()(x)
    kept, weights = routing.kept, routing.weights
    assert torch.bincount(routing.indices[kept], minlength=experts).max() == 1
    assert not weights[~kept].any()
    served = kept.any(-1)
    assert 0 < served.sum() <= experts
    if k == 2:
        torch.testing.assert_close(weights[served].sum(-1), torch.ones(int(served.sum())))
    assert sorted(slots(routing)[kept].tolist()) == [0] * int(kept.sum())
    weights.square().sum().backward()
    assert x.grad.isfinite().all()
    assert not x.grad.flatten(0, 1)[~served].any()
