"""Depth comes from structure: it agrees with the order in which parts really run."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny import DECODERS, model, text_config
from vlmix.core.errors import RecipeError
from vlmix.core.parts import ENCODERS
from vlmix.train.depth import depths
from vlmix.train.optim import build_optimizer
from vlmix.train.trainable import select, short_names


def reached(encoder, output):
    """Parameters that the output depends on."""
    named = list(encoder.parameters())
    grads = torch.autograd.grad(output.square().sum(), named, allow_unused=True)
    return {id(parameter) for parameter, grad in zip(named, grads, strict=True) if grad is not None}


@pytest.mark.parametrize("name", ENCODERS.names())
def test_depth_of_an_encoder_falls_from_block_to_block_as_it_runs(name):
    cls = ENCODERS.get(name)
    encoder = cls(cls.settings_class.tiny())
    found = depths(encoder)
    x = encoder.embed(torch.rand(1, 3, 40, 40))
    steps = [reached(encoder, x)]
    for index in range(encoder.spec.blocks):
        x = encoder.block(index, x.detach().requires_grad_())
        steps.append(reached(encoder, x))
    steps.append(reached(encoder, encoder.finish(x.detach().requires_grad_()).tokens))
    seen = [{found[key] for key in step} for step in steps if step]
    assert seen[0] == {max(found.values())}
    # A step may reach into the next block: what makes a stage's map smaller is registered with either stage.
    assert all(min(above) >= max(below) for above, below in pairwise(seen))
    assert len(set.union(*seen) - {0} - seen[0]) >= 2


@pytest.mark.parametrize("model_type", [*DECODERS])
def test_depth_of_a_decoder_counts_layers_from_the_head(model_type):
    config = AutoConfig.for_model(**text_config(model_type, tie_word_embeddings=False))
    decoder = AutoModelForCausalLM.from_config(config)
    found = {name: depths(decoder)[id(parameter)] for name, parameter in decoder.named_parameters()}
    layers = {name: int(name.split("layers.")[1].split(".")[0]) for name in found if "layers." in name}
    assert {*layers.values()} == {0, 1}
    assert all(found[name] == 2 - layer for name, layer in layers.items())
    outside = {name: depth for name, depth in found.items() if name not in layers}
    assert {depth for name, depth in outside.items() if "embed" in name} == {3}
    assert {depth for name, depth in outside.items() if "embed" not in name} == {0}


def test_rates_shrink_with_depth_for_every_group_and_in_the_table():
    whole = model()
    chosen = select(whole, {"*": 1e-2, "encoders.0.*": 1e-3}, 0.5)
    rates = {name: group.learning_rate for group in chosen.groups for name in group.parameters}
    first, last = "language_model.model.layers.0.", "language_model.model.layers.1."
    assert rates[first + "mlp.up_proj.weight"] == 1e-2 * 0.25
    assert rates[last + "input_layernorm.weight"] == 1e-2 * 0.5
    assert rates["language_model.model.embed_tokens.weight"] == 1e-2 * 0.125
    assert rates["language_model.lm_head.weight"] == 1e-2
    assert {rate for name, rate in rates.items() if name.startswith(("projector.", "fusion."))} == {1e-2}
    assert min(rate for name, rate in rates.items() if name.startswith("encoders.0.")) == 1e-3 * 0.125
    assert sorted(rates) == sorted(select(whole, {"*": 1.0}).parameters)
    assert [(row.learning_rate, row.lowest) for row in chosen.rows[:2]] == [
        (1e-2, 1e-2 / 32),
        (5e-4, 1.25e-4),
    ]
    optimizer = build_optimizer(chosen, {"kind": "muon", "weight_decay": 0.1}, whole)
    named = {id(parameter): name for name, parameter in short_names(whole).items()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["peak"] == rates[named[id(parameter)]]
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0)


def test_a_decay_for_some_globs_leaves_the_others_alone():
    whole = model()
    chosen = select(whole, {"*": 1.0}, {"encoders.0.*": 0.9, "encoders.0.tower.embeddings.*": 0.5})
    rates = {name: group.learning_rate for group in chosen.groups for name in group.parameters}
    assert {rate for name, rate in rates.items() if not name.startswith("encoders.0.")} == {1.0}
    assert rates["encoders.0.tower.embeddings.class_embedding"] == 0.5**3
    assert rates["encoders.0.tower.encoder.layers.0.mlp.fc1.weight"] == 0.9**2
    with pytest.raises(RecipeError, match=r"layer_decay: 'projector\.\*' matches no parameter of an encoder"):
        select(whole, {"*": 1.0}, {"projector.*": 0.9})
    assert {*depths(nn.Linear(2, 2)).values()} == {0}
