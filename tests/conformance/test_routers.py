"""Every registered router keeps the contract; none is named here."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from vlmix.core.errors import PlanError, RecipeError
from vlmix.core.interfaces import Part
from vlmix.core.parts import ROUTERS, read_part

EXPERTS, WIDTH, ROWS, TOKENS = 4, 12, 3, 10

each_router = pytest.mark.parametrize("name", ROUTERS.names())


def build(name, experts=EXPERTS):
    torch.manual_seed(2)
    part = ROUTERS.get(name)(ROUTERS.get(name).settings_class.tiny(), WIDTH, experts)
    with torch.no_grad():
        part.reset()
        for parameter in part.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return part.eval()


def tokens(name, rows=ROWS):
    """What the router reads: all tokens, or one vector a row."""
    count = 1 if ROUTERS.get(name).reads == "instruction" else TOKENS
    return torch.randn(rows, count, WIDTH, generator=torch.Generator().manual_seed(7))


def decided(routing):
    """Everything a layer acts upon."""
    found = [
        routing.logits,
        routing.probabilities,
        routing.indices,
        routing.weights,
        routing.kept,
        routing.rows,
    ]
    if routing.mixing is not None:
        found += [routing.mixing.dispatch, routing.mixing.combine]
    return [tensor for tensor in found if tensor is not None]


def shares(routing):
    """How much of every expert each token gets: (B, T, E)."""
    rows, count = routing.shape
    sums = torch.zeros(rows, count, EXPERTS)
    if routing.mixing is not None:
        slots = torch.zeros(rows, routing.mixing.combine.shape[2], EXPERTS)
        slots.view(-1, EXPERTS).scatter_add_(1, routing.indices, routing.weights)
        return routing.mixing.combine @ slots
    reads = torch.arange(rows * count) if routing.rows is None else routing.rows
    cells = reads[:, None] * EXPERTS + routing.indices
    return sums.view(-1).scatter_add(0, cells.flatten(), routing.weights.flatten()).view_as(sums)


@each_router
def test_settings_survive_json_and_refuse_a_misspelt_key(name):
    settings = ROUTERS.get(name).settings_class.tiny()
    raw = json.loads(settings.model_dump_json())
    assert read_part(ROUTERS, raw) == settings
    for key in raw:
        with pytest.raises(RecipeError, match=f"Did you mean '{key}'"):
            read_part(ROUTERS, {**raw, key + "x": 1})


@each_router
def test_planning_makes_no_module_and_refuses_more_experts_than_there_are(name, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("a module was built while planning")

    monkeypatch.setattr(nn.Module, "__init__", refuse)
    cls = ROUTERS.get(name)
    for settings in (cls.settings_class(), cls.settings_class.tiny()):
        cls.plan(settings, EXPERTS)
        assert 1 <= cls.met(settings, EXPERTS) <= EXPERTS
    if cls.met(settings, 1) > 1:
        with pytest.raises(PlanError, match=r"router\..* 1"):
            cls.plan(settings, 1)


@each_router
def test_decisions_have_the_shapes_that_layers_read(name):
    x = tokens(name)
    routing = build(name)(x)
    total = ROWS * x.shape[1]
    assert (routing.shape, routing.experts) == ((ROWS, x.shape[1]), EXPERTS)
    assert routing.logits.shape == routing.probabilities.shape == (total, EXPERTS)
    torch.testing.assert_close(routing.probabilities.sum(-1), torch.ones(total))
    assert routing.indices.shape == routing.weights.shape
    assert routing.indices.dtype == torch.int64
    assert 0 <= routing.indices.min() <= routing.indices.max() < EXPERTS
    assert (routing.weights >= 0).all()
    if routing.kept is not None:
        assert routing.kept.shape == routing.indices.shape
        assert not routing.weights[~routing.kept].any()
    if routing.mixing is not None:
        slots = len(routing.indices) // ROWS
        assert routing.mixing.dispatch.shape == (ROWS, slots, x.shape[1])
        assert routing.mixing.combine.shape == (ROWS, x.shape[1], slots)
    elif routing.rows is None:
        assert len(routing.indices) == total
    else:
        assert routing.rows.shape == routing.indices.shape[:1]
        assert 0 <= routing.rows.min() <= routing.rows.max() < total


@each_router
def test_gradients_are_finite_and_reach_every_parameter_but_the_inert(name):
    part = build(name).train()
    routing = part(tokens(name))
    loss = sum(
        (t * torch.randn_like(t)).sum()
        for t in decided(routing)
        if t.requires_grad and t is not routing.logits
    )
    loss.backward()
    inert = set(part.inert_parameters)
    for key, parameter in part.named_parameters():
        assert parameter.grad.isfinite().all(), key
        assert bool(parameter.grad.any()) == (key not in inert), key


@each_router
def test_evaluation_is_the_same_twice_and_after_loading(name):
    first, second = build(name), build(name)
    for parameter in second.parameters():
        parameter.data.zero_()
    for buffer in first.buffers():
        buffer.copy_(torch.randn_like(buffer))
    second.load_state_dict(first.state_dict())
    expected = decided(first(tokens(name)))
    torch.manual_seed(99)
    for part in (first, second):
        assert all(torch.equal(a, b) for a, b in zip(decided(part(tokens(name))), expected, strict=True))


@each_router
def test_scores_are_float32_whatever_the_weights_are(name):
    part = build(name).to(torch.bfloat16)
    rounded = tokens(name).to(torch.bfloat16)
    found = decided(part(rounded.float()))
    assert {tensor.dtype for tensor in found} <= {torch.float32, torch.int64, torch.bool}
    exact = part.float()(rounded.float())
    assert all(torch.equal(a, b) for a, b in zip(found, decided(exact), strict=True))


@each_router
def test_rows_of_a_batch_decide_for_themselves_where_promised(name):
    part, x, order = build(name), tokens(name), torch.tensor([2, 0, 1])
    if not part.rowwise:
        pytest.skip("rows of the batch compete")
    whole = shares(part(x))
    # Products of other shapes are summed in another order.
    torch.testing.assert_close(shares(part(x[order])), whole[order], rtol=0, atol=1e-6)
    torch.testing.assert_close(shares(part(x[:1])), whole[:1], rtol=0, atol=1e-6)


@each_router
def test_a_token_decides_the_same_before_later_ones_where_promised(name):
    part, x = build(name), tokens(name)
    if not (part.causal and part.rowwise):
        pytest.skip("tokens are compared")
    torch.testing.assert_close(shares(part(x[:, :4])), shares(part(x))[:, :4], rtol=0, atol=1e-6)


@each_router
def test_shapes_alone_an_empty_batch_and_reset(name):
    with torch.device("meta"):
        part = ROUTERS.get(name)(ROUTERS.get(name).settings_class.tiny(), WIDTH, EXPERTS).eval()
        assert all(tensor.is_meta for tensor in part.state_dict().values())
        assert part(torch.empty(tokens(name).shape)).indices.is_meta
    assert len(build(name)(tokens(name, rows=0)).indices) == 0
    part = build(name)
    assert isinstance(part, Part)
    with torch.no_grad():
        for tensor in part.state_dict().values():
            tensor.fill_(torch.nan)
        part.reset()
    assert all(tensor.isfinite().all() for tensor in decided(part(tokens(name))))
    assert {key for key, _ in part.named_buffers()} <= set(part.state_dict()), "unsaved buffers are garbage"


@each_router
def test_rebalancing_moves_load_towards_experts_without_work(name):
    """Routers without a bias stay as they are; one with a bias ends with an even load."""
    part = build(name)
    before = {key: value.clone() for key, value in part.state_dict().items()}
    x = torch.randn(4, 64, WIDTH, generator=torch.Generator().manual_seed(3)) + 1
    if not before.keys() - {key for key, _ in part.named_parameters()}:
        part.rebalance(torch.tensor([9.0, 1, 1, 1]), 0.1)
        assert all(torch.equal(value, before[key]) for key, value in part.state_dict().items())
        return

    def load():
        return part(x).indices.flatten().bincount(minlength=EXPERTS).float()

    uneven = load().std()
    for _ in range(200):
        part.rebalance(load(), 0.01)
    assert load().std() < 0.2 * uneven
