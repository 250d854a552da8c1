"""The loss without all logits, and pictures that nobody sees: the same numbers as without them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.parity.test_packing import conversations, mixture, network, same, trained
from tests.tiny import part
from vlmix.core.parts import FUSIONS
from vlmix.core.tape import record, recording, unrecorded
from vlmix.models import losses
from vlmix.models.batching import packed_row, padded_rows
from vlmix.models.losses import IGNORED, fused_next_token_loss, has_plain_head, next_token_loss
from vlmix.moe.balance import RoutingCounts


@pytest.mark.parametrize("kind", ["llama", "phi", "gpt_neox", "gpt2", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_plain_head_makes_no_logits_and_the_same_gradients(kind, tied):
    model = network(kind, tie_word_embeddings=tied)
    encoded, pictures = conversations(model)
    batch = {**padded_rows(encoded, 0, "right"), **pictures}
    plain = trained(model, batch, num_items_in_batch=40)
    fused = {"fused_loss": True, "logits_to_keep": "supervised"}
    same(plain, trained(model, batch, num_items_in_batch=40, **fused))
    assert model(**batch, **fused).logits is None
    row = {**packed_row(encoded), **pictures}
    same(plain, trained(model, row, num_items_in_batch=40, **fused))
    assert model(**{**batch, "labels": None}, fused_loss=True).logits is not None


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gemma2", {"final_logit_softcapping": 30.0}),
        ("cohere", {}),
        ("granite", {"logits_scaling": 2.0}),
    ],
)
def test_a_head_with_more_to_it_keeps_its_logits(kind, changes):
    model = network(kind, **changes)
    encoded, _ = conversations(model, (0, 0), (6, 9))
    batch = padded_rows(encoded, 0, "right")
    assert not has_plain_head(model.model.language_model)
    found = model(**batch, fused_loss=True)
    assert found.logits is not None
    assert_close(found.loss, model(**batch).loss)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 700])
def test_chunks_of_the_loss_are_the_whole(bias, rows, monkeypatch):
    monkeypatch.setattr(losses, "_CELLS", {"cpu": 5000})  # 100 rows at one time
    torch.manual_seed(0)
    head, states = nn.Linear(16, 50, bias=bias), torch.randn(2, 400, 16)
    labels = torch.full((2, 400), IGNORED)
    places = torch.randperm(798)[:rows]
    labels[places // 399, 1 + places % 399] = torch.randint(50, (rows,))
    found = []
    for fused in (True, False):
        head.zero_grad()
        x = states.clone().requires_grad_()
        loss = fused_next_token_loss(x, head, labels, 5) if fused else next_token_loss(head(x), labels, 0, 5)
        (2 * loss).backward()
        found.append([loss, x.grad, *(parameter.grad for parameter in head.parameters())])
    # float32 sums of up to 700 terms in another order.
    for ours, plain in zip(*found, strict=True):
        assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_the_loss_computes_in_the_precision_of_its_surroundings():
    torch.manual_seed(0)
    head, states = nn.Linear(16, 50), torch.randn(1, 30, 16)
    labels = torch.randint(50, (1, 30))
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = (
            fused_next_token_loss(states, head, labels, None),
            next_token_loss(head(states), labels, 0, None),
        )
    assert_close(ours, plain, rtol=0, atol=1e-6)  # the same bfloat16 logits, summed in float32
    ours.backward()
    assert head.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    "fusion",
    [
        {"kind": "patch_mining"},
        {"kind": "mixture_of_vision_experts", "align": "average", "width": 32},
        {**part(FUSIONS, "spatial_aggregator"), "inside": {"after": [0], "width": 32}},
    ],
)
def test_pictures_that_nobody_sees_change_nothing(fusion):
    model = network(fusion=fusion)
    encoded, _ = conversations(model, (0, 0), (6, 9))
    batch = padded_rows(encoded, 0, "right")
    if model.config.reads_instruction:
        batch["instruction_ids"] = torch.ones(2, 1, dtype=torch.int64)
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():  # large, but no overflow on the way
        for parameter in model.model.projector.parameters():
            parameter.mul_(1e10)
    without = trained(model, batch)
    loss, gradients = trained(model, batch, pixel_values=pixels, unseen_pictures=True)
    assert torch.equal(loss, without[0])
    for name, gradient in gradients.items():
        expected = without[1].get(name)
        assert torch.equal(gradient, torch.zeros_like(gradient) if expected is None else expected), name
    seen = trained(network(fusion=fusion), _shown(model))[1]
    assert gradients.keys() >= seen.keys()


def _shown(model):
    encoded, pictures = conversations(model, (1, 0), (6, 9))
    batch = {**padded_rows(encoded, 0, "right"), **pictures}
    told = {"instruction_ids": torch.ones(2, 1, dtype=torch.int64)} if model.config.reads_instruction else {}
    return {**batch, **told}


def test_routing_of_pictures_that_nobody_sees_counts_as_nothing():
    experts = [
        mixture(place="encoders.0", balance={"switch": 0.5, "z": 0.1, "padding": "counted"}),
        mixture(balance={"switch": 0.5}),
    ]
    model = network(experts=experts)
    encoded, _ = conversations(model, (0, 0), (6, 9))
    batch = padded_rows(encoded, 0, "right")
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    counts = RoutingCounts(), RoutingCounts()
    without = model(**batch, routing_counts=counts[0])
    unseen = model(**batch, routing_counts=counts[1], pixel_values=pixels, unseen_pictures=True)
    assert torch.equal(without.loss, unseen.loss)
    assert torch.equal(without.aux_loss, unseen.aux_loss)
    assert len(unseen.routing) == len(without.routing)
    # Counted all the same, with nothing: processes that saw pictures wait for it.
    assert counts[0].layers.keys() < counts[1].layers.keys()
    for name, chosen in counts[1].layers.items():
        assert torch.equal(chosen, counts[0].layers.get(name, torch.zeros_like(chosen)))


def test_a_recording_inside_what_is_unrecorded_stays_inside():
    with recording() as outer:
        with unrecorded() as kept, recording() as inner:
            record(None)
        record(None)
    assert (len(outer), len(kept), len(inner)) == (1, 1, 1)
