"""What every method of continual learning owes, found by listing: put through a task from begin to end."""

import copy

import pytest
import torch
from torch.testing import assert_close

from tests import tiny
from vlmix.core.settings import read_settings
from vlmix.train.continual import CONTINUAL
from vlmix.train.trainable import select, set_modes

TRAIN = {"projector.*": 1e-3, "language_model.*": 1e-3}
each = pytest.mark.parametrize("name", CONTINUAL.names())


def build(name, **changes):
    cls = CONTINUAL.get(name)
    return cls(cls.settings_class.tiny().changed(**changes))


def batch():
    torch.manual_seed(1)
    ids = torch.randint(4, 60, (4, 10))
    labels = ids.clone()
    labels[:, :3] = labels[0, 3:6] = labels[2, 7:] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def shuffled(model):
    """Weights apart from those a teacher or anchor has."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


def begun(name):
    torch.manual_seed(0)
    method, model = build(name), tiny.model("gpt_neox")
    method.reshape(model)
    method.fill(model)
    select(model, method.train(TRAIN, model))
    set_modes(model)
    method.begin(model)
    shuffled(model)
    return method, model


def cost(method, model, part, items):
    """Loss and gradients of one micro-batch of a step with ``items`` supervised tokens."""
    model.zero_grad(set_to_none=True)
    output = model(**part, logits_to_keep="supervised", num_items_in_batch=items, use_cache=False)
    loss = method.loss(model, part, output, items)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def items_of(part):
    return int((part["labels"][:, 1:] != -100).sum())


@each
def test_settings_survive_json_and_refuse_unknown_keys(name):
    cls = CONTINUAL.get(name)
    settings = cls.settings_class.tiny()
    assert settings.kind == name
    assert read_settings(cls.settings_class, settings.model_dump(mode="json")) == settings
    with pytest.raises(Exception, match="unknown key"):
        settings.changed(wrong=1)


@each
def test_micro_batches_add_up_to_the_batch(name):
    method, model = begun(name)
    whole = batch()
    items = items_of(whole)
    loss, gradients = cost(method, model, whole, items)
    halves = [{key: value[rows] for key, value in whole.items()} for rows in (slice(0, 1), slice(1, 4))]
    parts = [cost(method, model, half, items) for half in halves]
    # float32 sums in another order.
    assert_close(sum(part[0] for part in parts), loss, atol=1e-5, rtol=1e-5)
    for key, gradient in gradients.items():
        assert_close(sum(part[1][key] for part in parts), gradient, atol=1e-5, rtol=1e-4)


@each
def test_one_row_of_all_conversations_costs_the_same_in_bf16(name):
    method, model = begun(name)
    whole = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(
            **whole, logits_to_keep="supervised", num_items_in_batch=items_of(whole), use_cache=False
        )
        low = method.loss(model, whole, output, items_of(whole))
    loss, _ = cost(method, model, whole, items_of(whole))
    assert low.dtype == torch.float32
    assert_close(low.detach(), loss, atol=0.02, rtol=0.02)  # eight bits of mantissa


@each
def test_checkpointing_changes_nothing(name):
    method, model = begun(name)
    whole = batch()
    loss, gradients = cost(method, model, whole, items_of(whole))
    tiny.switch_checkpointing_on(model)
    again, same = cost(method, model, whole, items_of(whole))
    assert torch.equal(again, loss)
    assert all(torch.equal(same[key], value) for key, value in gradients.items())


@each
def test_its_state_brings_it_back_inside_a_task(name):
    method, model = begun(name)
    whole = batch()
    loss, gradients = cost(method, model, whole, items_of(whole))
    state = {key: tensor.clone() for key, tensor in method.state().items()}
    other = build(name)
    torch.manual_seed(9)
    twin = tiny.model("gpt_neox")
    other.reshape(twin)
    twin.load_state_dict(model.state_dict())
    select(twin, other.train(TRAIN, twin))
    set_modes(twin)
    other.load(state, twin)
    again, same = cost(other, twin, whole, items_of(whole))
    assert torch.equal(again, loss)
    assert gradients.keys() == same.keys()
    assert all(torch.equal(same[key], value) for key, value in gradients.items())
    assert {key: tensor.shape for key, tensor in other.state().items()} == {
        key: tensor.shape for key, tensor in state.items()
    }


@each
def test_a_task_ends_with_the_model_as_it_was_built(name):
    method, model = begun(name)
    model.eval()
    before = model(input_ids=batch()["input_ids"]).logits
    parts = [{key: value[i : i + 1] for key, value in batch().items()} for i in range(4)]
    method.end(model, iter(parts))
    assert_close(
        model(input_ids=batch()["input_ids"]).logits, before, atol=1e-5, rtol=1e-5
    )  # merged: rounding
    assert [n for n, _ in model.named_parameters()] == [
        n for n, _ in tiny.model("gpt_neox").named_parameters()
    ]
    assert not [key for key in method.state() if "teacher" in key]
    method.reshape(model)
    select(model, method.train(TRAIN, model))
    method.begin(model)
    assert cost(method, model, batch(), items_of(batch()))[0].isfinite()


@each
def test_what_it_reads_it_says(name):
    """Without logits, as a fused loss leaves them, whatever does not ask for them still works."""
    method, model = begun(name)
    whole = batch()
    output = model(**whole, logits_to_keep="supervised", num_items_in_batch=items_of(whole), use_cache=False)
    blind = copy.copy(output)
    blind.logits = None
    if method.reads_logits:
        with pytest.raises(ValueError, match="logits"):
            method.loss(model, whole, blind, items_of(whole))
    else:
        full = method.loss(model, whole, output, items_of(whole))
        assert torch.equal(method.loss(model, whole, blind, items_of(whole)), full)
