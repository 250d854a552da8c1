"""Routers against transformers' own, on tiny random weights."""

from __future__ import annotations

import pytest
import torch
from transformers import DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from vlmix.moe.routers.sigmoid import SigmoidRouter, SigmoidSettings
from vlmix.moe.routers.topk import TopkRouter, TopkSettings

pytestmark = pytest.mark.parity
WIDTH, EXPERTS = 24, 8


def tokens():
    return torch.randn(3, 11, WIDTH, generator=torch.Generator().manual_seed(5))


def same_decision(ours, theirs, x, gate):
    """Logits, shares of every expert, and the gradient of the gate; exact, or one rounding apart."""
    theirs_logits, theirs_weights, theirs_indices = theirs(x)
    routing = ours(x)
    torch.testing.assert_close(routing.logits, theirs_logits, rtol=0, atol=1e-6)
    empty = torch.zeros(33, EXPERTS)
    shares = [
        empty.scatter(1, routing.indices, routing.weights),
        empty.scatter(1, theirs_indices, theirs_weights),
    ]
    torch.testing.assert_close(*shares, rtol=0, atol=1e-6)
    pull = torch.randn(33, EXPERTS)
    gradients = [torch.autograd.grad((s * pull).sum(), w)[0] for s, w in zip(shares, gate, strict=True)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(("groups", "kept"), [(1, 1), (4, 2), (2, 1), (4, 4)])
def test_sigmoid_is_deepseeks(groups, kept, renormalise):
    torch.manual_seed(0)
    config = DeepseekV3Config(
        hidden_size=WIDTH,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=3,
        n_group=groups,
        topk_group=kept,
        norm_topk_prob=renormalise,
        routed_scaling_factor=2.5,
    )
    settings = SigmoidSettings(k=3, groups=groups, groups_kept=kept, renormalise=renormalise, scale=2.5)
    theirs, ours = DeepseekV3TopkRouter(config), SigmoidRouter(settings, WIDTH, EXPERTS)
    torch.nn.init.normal_(theirs.weight, std=0.5)
    theirs.e_score_correction_bias.normal_(std=0.3)
    ours.gate.weight.data.copy_(theirs.weight)
    ours.choice_bias.copy_(theirs.e_score_correction_bias)
    same_decision(ours, theirs, tokens(), (ours.gate.weight, theirs.weight))
    ours.choice_bias.zero_()
    assert (ours(tokens()).indices.sort().values != theirs(tokens())[2].sort().values).any(), (
        "no bias at work"
    )


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_topk_is_mixtrals_and_qwens(k, renormalise):
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_experts_per_tok": k}
    if renormalise:
        theirs = MixtralTopKRouter(MixtralConfig(num_local_experts=EXPERTS, **sizes))
    else:
        theirs = Qwen3MoeTopKRouter(Qwen3MoeConfig(num_experts=EXPERTS, norm_topk_prob=False, **sizes))
    torch.nn.init.normal_(theirs.weight, std=0.5)
    ours = TopkRouter(TopkSettings(k=k, renormalise=renormalise), WIDTH, EXPERTS)
    ours.gate.weight.data.copy_(theirs.weight)
    same_decision(ours, theirs, tokens(), (ours.gate.weight, theirs.weight))
