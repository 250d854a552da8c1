"""Balance of experts: the unit, what it is elsewhere, whose tokens count, and that routers feel it."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from tests import tiny
from vlmix.core.errors import VlmixError
from vlmix.core.experts import BalanceSettings, ExpertSettings
from vlmix.core.tensors import Routing
from vlmix.models.mixtures import rebalance
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.moe import balance
from vlmix.moe.balance import Positions, RoutingCounts, balance_loss
from vlmix.moe.install import expert_layers

ROWS, LENGTH, EXPERTS = 3, 8, 4
ONLY_SWITCH = BalanceSettings(switch=1.0)


def routing(seed=0, k=2, layer="a", logits=None):
    drawn = torch.randn(ROWS * LENGTH, EXPERTS, generator=torch.Generator().manual_seed(seed))
    logits = (drawn if logits is None else logits).requires_grad_()
    probabilities = logits.softmax(-1)
    weights, indices = probabilities.topk(k)
    return Routing((ROWS, LENGTH), logits, probabilities, indices, weights, layer=layer)


def test_an_even_load_costs_one_and_a_collapsed_one_the_number_of_experts():
    even = torch.eye(EXPERTS).repeat(ROWS * LENGTH // EXPERTS, 1) * 1e-3
    assert balance_loss([routing(k=1, logits=even)], ONLY_SWITCH).item() == pytest.approx(1, abs=1e-6)
    one = torch.zeros(ROWS * LENGTH, EXPERTS)
    one[:, 2] = 50
    assert balance_loss([routing(k=1, logits=one)], ONLY_SWITCH).item() == pytest.approx(EXPERTS, abs=1e-4)


def test_coefficients_of_other_systems_give_the_same_gradient():
    ours, theirs = routing(), routing()
    balance_loss([ours], BalanceSettings(switch=0.3)).backward()
    other = load_balancing_loss_func((theirs.logits,), EXPERTS, 2)
    (balance.huggingface_coefficient(0.3, k=2) * other).backward()
    # Two orders of summing 24 tokens in float32.
    torch.testing.assert_close(ours.logits.grad, theirs.logits.grad, rtol=1e-5, atol=1e-8)
    assert balance.from_huggingface(balance.huggingface_coefficient(0.3, 2), 2) == pytest.approx(0.3)
    assert balance.from_deepspeed(balance.deepspeed_coefficient(0.3, 12), 12) == pytest.approx(0.3)
    layers = [routing(seed) for seed in range(3)]
    summed = sum(balance_loss([one], ONLY_SWITCH) for one in layers)
    assert balance.deepspeed_coefficient(0.3, 3) * summed.item() == pytest.approx(
        balance_loss(layers, BalanceSettings(switch=0.3)).item()
    )
    assert balance.megablocks_coefficient(0.3) == 0.3


def test_z_loss_is_the_mean_square_of_the_log_sum():
    made = routing()
    found = balance_loss([made], BalanceSettings(switch=0, z=0.5))
    assert found.item() == pytest.approx(0.5 * made.logits.logsumexp(-1).square().mean().item())


def test_padding_counts_only_where_it_is_told_to():
    real = torch.ones(ROWS, LENGTH, dtype=torch.long)
    real[1, 3:] = 0
    padded, positions = routing(), Positions(real)
    kept = real.flatten().bool()
    alone = Routing(
        (1, int(kept.sum())), padded.logits[kept], padded.probabilities[kept], padded.indices[kept],
        padded.weights[kept],
    )  # fmt: skip
    masked = BalanceSettings(switch=1.0, z=0.1)
    torch.testing.assert_close(balance_loss([padded], masked, positions), balance_loss([alone], masked))
    counted = BalanceSettings(switch=1.0, z=0.1, padding="counted")
    assert balance_loss([padded], counted, positions) == balance_loss([padded], counted)


def test_padding_is_found_where_a_decoder_joins_all_rows_into_one():
    real = torch.ones(ROWS, LENGTH, dtype=torch.long)
    real[1, 3:] = 0
    made = routing()
    joined = replace(made, shape=(1, ROWS * LENGTH))
    assert balance_loss([joined], ONLY_SWITCH, Positions(real)) == balance_loss(
        [made], ONLY_SWITCH, Positions(real)
    )


def test_counts_and_losses_are_exact_under_autocast():
    """bfloat16 has eight bits: 1,085 choices would be 1,080."""
    many = torch.randn(2400, EXPERTS, generator=torch.Generator().manual_seed(0))
    shares = many.softmax(-1)
    weights, indices = shares.topk(2)
    made, settings = Routing((1, 2400), many, shares, indices, weights, layer="a"), BalanceSettings(z=0.1)
    plain, rounded = RoutingCounts(), RoutingCounts()
    expected = balance_loss([made], settings, counts=plain)
    with torch.autocast("cpu", torch.bfloat16):
        found = balance_loss([made], settings, counts=rounded)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert torch.equal(rounded.layers["a"], plain.layers["a"])
    assert plain.layers["a"].sum() == indices.numel()


def test_modalities_are_balanced_each_by_itself():
    """Text to expert 0 and pictures to expert 1 is even over both and collapsed in each."""
    visual = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    visual[:, :4] = True
    logits = torch.full((ROWS * LENGTH, 2), -50.0)
    logits[torch.arange(ROWS * LENGTH), visual.flatten().long()] = 50
    probabilities = logits.softmax(-1)
    weights, indices = probabilities.topk(1)
    made = Routing((ROWS, LENGTH), logits, probabilities, indices, weights)
    together = balance_loss([made], ONLY_SWITCH, Positions(None, visual))
    apart = balance_loss([made], BalanceSettings(switch=1.0, per_modality=True), Positions(None, visual))
    assert (together.item(), apart.item()) == (pytest.approx(1), pytest.approx(2))


def test_shares_are_those_of_the_whole_step():
    """The last of two micro-batches is weighed with what both chose."""
    first, last, counts = routing(0), routing(1), RoutingCounts()
    balance_loss([first], ONLY_SWITCH, counts=counts)
    found = balance_loss([last], ONLY_SWITCH, counts=counts)
    chosen = torch.bincount(torch.cat((first.indices, last.indices)).flatten(), minlength=EXPERTS).float()
    expected = EXPERTS * (chosen / chosen.sum() * last.probabilities.mean(0)).sum()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(counts.layers["a"].sum(0), chosen)


def mixture(**changes):
    config = tiny.config(experts=[ExpertSettings(layers="all", **changes).model_dump(mode="json")])
    torch.manual_seed(0)
    return VlmixForConditionalGeneration(config)


def batch():
    ids = torch.randint(4, 60, (3, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def with_pictures(model, rows):
    """Each row behind one picture of noise."""
    size = (3, model.config.image_seq_length)
    front = {
        "input_ids": torch.full(size, tiny.PLACEHOLDER),
        "labels": torch.full(size, -100),
        "attention_mask": torch.ones(size, dtype=torch.long),
    }
    pictures = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return {name: torch.cat((front[name], rows[name]), 1) for name in rows} | {"pixel_values": pictures}


def router_gradients(model):
    return [p.grad.clone() for layer in expert_layers(model) for p in layer.router.parameters()]


@pytest.mark.parametrize("place", ["language_model", "encoders.0"])
def test_balance_reaches_routers_through_gradient_checkpointing(place):
    """Copied experts give the router no other gradient, so what arrives is the balance loss alone."""
    model = mixture(place=place, balance={"switch": 1.0}).train()
    with torch.no_grad():
        for layer in expert_layers(model):
            for stack in (layer.experts.first, layer.experts.down_proj):
                stack.copy_(stack[:1].expand_as(stack))
    inputs = with_pictures(model, batch())
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            tiny.switch_checkpointing_on(model)
        model.zero_grad()
        model(**inputs).loss.backward()
        gradients.append(router_gradients(model))
    for plain, again in zip(*gradients, strict=True):
        assert plain.abs().max() > 1e-5
        torch.testing.assert_close(plain, again)


@pytest.mark.parametrize("place", ["language_model", "encoders.0"])
def test_what_runs_once_more_for_its_gradients_is_counted_once(place):
    model = mixture(place=place).train()
    inputs, counts, lengths = with_pictures(model, batch()), [], []
    for checkpointing in (False, True):
        if checkpointing:
            tiny.switch_checkpointing_on(model)
        counted = RoutingCounts()
        output = model(**inputs, routing_counts=counted)
        output.loss.backward()
        counts.append({name: found.sum(0).tolist() for name, found in counted.layers.items()})
        lengths.append(len(output.routing))
    assert counts[0] == counts[1]
    assert lengths == [len(expert_layers(model))] * 2


def test_reentrant_checkpointing_is_refused_not_ignored():
    model = mixture().train()
    new = "activation_checkpointing_enable"
    switch = getattr(model, new if hasattr(model, new) else "gradient_checkpointing_enable")
    switch({"use_reentrant": True})
    with pytest.raises(VlmixError, match="reentrant"):
        model(**batch())


def test_the_loss_is_cross_entropy_plus_what_it_says_of_balance():
    model = mixture(balance={"switch": 0.5, "z": 0.1}).eval()
    output, bare = model(**batch()), model(**{**batch(), "labels": None})
    assert len(output.routing) == len(expert_layers(model)) == 2
    assert (bare.loss, bare.aux_loss) == (None, None)
    logits, labels = output.logits[:, :-1].flatten(0, 1), batch()["labels"][:, 1:].flatten()
    plain = nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(output.loss, plain + output.aux_loss)
    assert output.aux_loss > 0.5  # at least one by the switch loss


def test_micro_batches_weigh_by_their_tokens():
    """Two halves of a batch, told the tokens of the whole, cost what the weighted mean of both costs."""
    model = mixture().eval()
    inputs = batch()
    inputs["labels"] = inputs["labels"].clone()
    inputs["labels"][0, :6] = -100
    parts = [{name: value[rows] for name, value in inputs.items()} for rows in (slice(0, 1), slice(1, 3))]
    counts = [int((part["labels"][:, 1:] != -100).sum()) for part in parts]
    found = [model(**part, num_items_in_batch=sum(counts)).aux_loss for part in parts]
    alone = [model(**part).aux_loss for part in parts]
    expected = sum(n * loss for n, loss in zip(counts, alone, strict=True)) / sum(counts)
    torch.testing.assert_close(sum(found), expected)


def test_biases_move_towards_experts_with_little_to_do():
    """Also where the bias is all that balances: the loss then has no part of it, but choices are counted."""
    model = mixture(router={"kind": "sigmoid", "k": 1}, balance={"switch": 0.0, "bias_rate": 0.1})
    layer, counts = expert_layers(model)[0], RoutingCounts()
    output = model(**batch(), routing_counts=counts)
    assert output.aux_loss == 0
    load = counts.layers[layer.name].sum(0)
    assert load.sum() == batch()["input_ids"].numel()
    rebalance(model, counts)
    bias, mean = layer.router.choice_bias, load.mean()
    for expert, loaded in enumerate(load):
        raised = (bias[expert] - bias[load.argmax()]).item()
        assert raised == pytest.approx(0.2 if loaded < mean else 0.1 if loaded == mean else 0)
    assert bias.sum().item() == pytest.approx(0, abs=1e-6)


def test_biases_of_a_frozen_router_stay():
    """What a stage does not train chooses as before."""
    model = mixture(router={"kind": "sigmoid", "k": 1}, balance={"bias_rate": 0.1})
    first, second = expert_layers(model)
    first.router.requires_grad_(False)
    counts = RoutingCounts()
    model(**batch(), routing_counts=counts)
    rebalance(model, counts)
    assert not first.router.choice_bias.any()
    assert second.router.choice_bias.any()


def test_biases_stay_exact_in_a_model_loaded_in_sixteen_bits(tmp_path):
    model = mixture(router={"kind": "sigmoid"})
    expert_layers(model)[0].router.choice_bias.fill_(0.2507)
    model.save_pretrained(tmp_path)
    again = VlmixForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    router = expert_layers(again)[0].router
    assert router.choice_bias[0] == torch.tensor(0.2507)
    assert router.gate.weight.dtype == torch.bfloat16
