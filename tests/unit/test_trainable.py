"""Globs choose what trains; frozen parts stay in eval mode; rates and decay follow the groups."""

import io
from itertools import pairwise

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from vlmix.core.errors import RecipeError
from vlmix.core.optimization import ScheduleSettings
from vlmix.core.parts import ENCODERS
from vlmix.moe.experts import StackedExperts
from vlmix.train.optim import build_optimizer, rate_factor, set_rates, warmup_steps
from vlmix.train.trainable import select, set_modes, short_names, table


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.eye = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.model.projector = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Dropout(0.5))
        self.model.head = nn.Linear(3, 5, bias=False)
        self.model.words = nn.Embedding(5, 3)
        self.model.head.weight = self.model.words.weight


def names(selection):
    return {
        (group.pattern, group.learning_rate, group.decay): sorted(group.parameters)
        for group in selection.groups
    }


def test_globs_make_groups_and_freeze_the_rest():
    model = Toy()
    chosen = select(model, {"projector.*": 1e-3, "projector.1.*": 1e-4})
    assert names(chosen) == {
        ("projector.*", 1e-3, True): ["projector.0.weight"],
        ("projector.*", 1e-3, False): ["projector.0.bias"],
        ("projector.1.*", 1e-4, False): ["projector.1.bias", "projector.1.weight"],
    }
    trained = {name for name, parameter in short_names(model).items() if parameter.requires_grad}
    assert trained == set(chosen.parameters)
    assert [(row.pattern, row.tensors, row.parameters) for row in chosen.rows] == [
        ("projector.*", 2, 15),
        ("projector.1.*", 2, 6),
        ("frozen", 5, 43),
    ]
    assert sum(row.parameters for row in chosen.rows) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("pattern", ["head.*", "words.*"])
def test_tied_weights_train_under_either_name_and_count_once(pattern):
    model = Toy()
    chosen = select(model, {pattern: 1e-3})
    assert chosen.rows[0].tensors == 1
    assert model.model.words.weight.requires_grad
    tied = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=9,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )
    assert select(tied, {"lm_head.*": 1e-3}).rows[0].parameters == 72


def test_the_last_matching_glob_decides():
    first = select(Toy(), {"*": 1e-3, "eye.0.*": 1e-5})
    assert {group.pattern for group in first.groups if "eye.0.weight" in group.parameters} == {"eye.0.*"}
    with pytest.raises(RecipeError, match=r"'eye\.0\.\*'.*taken over by later globs"):
        select(Toy(), {"eye.0.*": 1e-5, "*": 1e-3})


@pytest.mark.parametrize(
    ("pattern", "near"),
    [("projektor.*", r"projector\*"), ("projector.7.*", r"projector\.[01]\*"), ("zz", "eye")],
)
def test_a_glob_that_matches_nothing_names_near_parameters(pattern, near):
    with pytest.raises(RecipeError, match=near) as caught:
        select(Toy(), {pattern: 1e-3})
    assert pattern in str(caught.value)


def test_frozen_modules_are_in_eval_mode_while_the_rest_trains():
    model = Toy()
    select(model, {"projector.*": 1e-3})
    set_modes(model)
    assert model.training
    assert all(module.training for module in model.model.projector.modules())
    assert not any(module.training for module in model.model.eye.modules())
    before = model.model.eye[1].running_mean.clone()
    model.model.eye(torch.randn(6, 4))
    assert torch.equal(before, model.model.eye[1].running_mean)
    select(model, {"eye.0.*": 1e-3})
    set_modes(model)
    assert [module.training for module in model.model.eye] == [True, False, True]
    assert not model.model.projector.training


def test_the_table_shows_every_row():
    console = Console(width=100, file=io.StringIO())
    console.print(table(select(Toy(), {"projector.[01].*": 2e-4}), "align"))
    for expected in ("stage align", "projector.[01].*", "0.0002", "frozen", "43"):
        assert expected in console.file.getvalue()


def test_only_matrices_are_decayed_and_rates_follow_the_factor():
    chosen = select(Toy(), {"*": 1e-2, "head.*": 1e-3})
    settings = {"kind": "adamw", "weight_decay": 0.1, "betas": (0.8, 0.95)}
    optimizer = build_optimizer(chosen, settings, nn.Module())
    for group, expected in zip(optimizer.param_groups, chosen.groups, strict=True):
        assert group["weight_decay"] == (0.1 if expected.decay else 0.0)
        assert all((parameter.ndim > 1) == expected.decay for parameter in group["params"])
        assert group["betas"] == (0.8, 0.95)
    assert set_rates(optimizer, 0.5) == {"*": 5e-3, "head.*": 5e-4}
    assert {group["lr"] for group in optimizer.param_groups} == {5e-3, 5e-4}


def test_muon_takes_the_matrices_inside_and_adamw_the_rest():
    config = LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    chosen = select(model, {"*": 1e-2, "layers.*": 1e-3})
    optimizer = build_optimizer(chosen, {"kind": "muon"}, model)
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices = {
        named[id(p)] for group in optimizer.param_groups if group["matrices"] for p in group["params"]
    }
    assert matrices == {
        name for name in named.values() if ".layers." in name and name.endswith("proj.weight")
    }
    every = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(every) == sorted(named)
    assert set_rates(optimizer, 0.5) == {"*": 5e-3, "layers.*": 5e-4}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.arange(11)[None], labels=torch.arange(11)[None]).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        change = (parameter - before[name]).detach()
        rate = 5e-4 if ".layers." in name else 5e-3
        if name in matrices:  # moved by the size AdamW's updates usually have
            assert 0.1 * rate < change.square().mean().sqrt() < 0.4 * rate
        else:
            assert change.abs().max() <= 1.01 * rate


def test_biases_of_experts_are_not_decayed_and_tables_of_positions_are_no_matrices():
    """Both have two dimensions: (experts, outputs) and (places, channels)."""
    model = nn.Module()
    sizes, biased = (4, 8, 4), (True, True)
    model.experts = StackedExperts(PreTrainedConfig(), 3, sizes, nn.ReLU(), gated=False, bias=biased)
    model.eye = ENCODERS.get("sam")(ENCODERS.get("sam").settings_class.tiny())
    chosen = select(model, {"*": 1e-2})
    for kind in ("adamw", "muon"):
        optimizer = build_optimizer(chosen, {"kind": kind, "weight_decay": 0.1}, model)
        named = {id(parameter): name for name, parameter in model.named_parameters()}
        free, orthogonal = (
            {named[id(p)] for group in optimizer.param_groups if wanted(group) for p in group["params"]}
            for wanted in (lambda g: not g["weight_decay"], lambda g: g.get("matrices"))
        )
        assert {"experts.up_proj_bias", "experts.down_proj_bias"} <= free
        assert "experts.up_proj" not in free
        assert (kind == "muon") == any(name.endswith("qkv.weight") for name in orthogonal)
        assert not any("rel_pos" in name or name.endswith("bias") for name in orthogonal)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_the_schedule_rises_to_one_and_falls_to_the_floor(kind):
    settings = ScheduleSettings(kind=kind, warmup_steps=4, floor=0.1)
    rates = [rate_factor(settings, step, 20) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert all(a >= b for a, b in pairwise(rates[3:]))
    assert rate_factor(settings, 20, 20) == pytest.approx(1.0 if kind == "constant" else 0.1)
    assert rate_factor(settings, 12, 20) == pytest.approx(1.0 if kind == "constant" else 0.55)


def test_warmup_is_steps_or_a_share():
    assert warmup_steps(ScheduleSettings(warmup_share=0.1), 25) == 3
    assert warmup_steps(ScheduleSettings(warmup_steps=50), 25) == 25
    assert rate_factor(ScheduleSettings(warmup_share=0.0), 0, 1) == 1.0
