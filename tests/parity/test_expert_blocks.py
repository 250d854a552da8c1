"""Expert layers against transformers' own mixtures, and library models that became mixtures."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeepseekV3Config,
    LlamaConfig,
    MixtralConfig,
    Qwen3MoeConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from vlmix.core.experts import ExpertSettings
from vlmix.moe.install import install, upcycle

pytestmark = pytest.mark.parity
WIDTH, INNER, EXPERTS, K = 32, 48, 6, 3
SIZES = {"hidden_size": WIDTH, "num_experts_per_tok": K}
BLOCKS = {
    "mixtral": (
        MixtralSparseMoeBlock,
        MixtralConfig(**SIZES, num_local_experts=EXPERTS, intermediate_size=INNER),
        {"router": {"kind": "topk", "k": K}},
    ),
    "qwen3_moe": (
        Qwen3MoeSparseMoeBlock,
        Qwen3MoeConfig(**SIZES, num_experts=EXPERTS, moe_intermediate_size=INNER, norm_topk_prob=False),
        {"router": {"kind": "topk", "k": K, "renormalise": False}},
    ),
    "deepseek_v3": (
        DeepseekV3MoE,
        DeepseekV3Config(
            **SIZES, n_routed_experts=EXPERTS, moe_intermediate_size=INNER, n_group=2, topk_group=1
        ),
        {"router": {"kind": "sigmoid", "k": K, "groups": 2, "scale": 2.5}, "shared": 1},
    ),
}
# Their names, then ours.
RENAMED = (
    ("gate.e_score_correction_bias", "router.choice_bias"),
    ("gate.w", "router.gate.w"),
    ("shared_experts.", "shared.0."),
)


def renamed(key):
    for theirs, ours in RENAMED:
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return key


def pair(name, implementation, dtype):
    """Their block and our layer with the same weights; theirs is always eager."""
    torch.manual_seed(0)
    cls, config, changes = BLOCKS[name]
    config._experts_implementation = "eager"
    theirs = cls(config).to(dtype)
    with torch.no_grad():
        for tensor in theirs.state_dict().values():
            tensor.normal_(std=0.2)
    ours_config = LlamaConfig(hidden_size=WIDTH, intermediate_size=INNER)
    ours_config._experts_implementation = implementation
    holder = nn.ModuleDict({"projector": LlamaMLP(ours_config).to(dtype)})
    settings = ExpertSettings(place="projector", layers="all", count=EXPERTS, **changes)
    (ours,) = install(holder, settings, ours_config, causal=False)
    ours.load_state_dict({renamed(key): tensor for key, tensor in theirs.state_dict().items()})
    return theirs, ours


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", BLOCKS)
def test_layers_are_transformers_blocks(name, implementation):
    theirs, ours = pair(name, implementation, torch.float32)
    x = torch.randn(3, 9, WIDTH)
    pull, inputs = torch.randn_like(x), [x.clone().requires_grad_() for _ in range(2)]
    outputs = [block(read) for block, read in zip((theirs, ours), inputs, strict=True)]
    # float32 sums of about 50 terms of size one in another order.
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    for y in outputs:
        (y * pull).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-5, atol=1e-5)
    gradients = {key: parameter.grad for key, parameter in ours.named_parameters()}
    for key, parameter in theirs.named_parameters():
        torch.testing.assert_close(gradients.pop(renamed(key)), parameter.grad, rtol=1e-5, atol=2e-5)
    assert not gradients


def vision(config_class, model_class):
    config = config_class(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    return model_class(config), torch.randn(2, 3, 16, 16)


def decoder(model_type):
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": 64, "pad_token_id": 0,
    }  # fmt: skip
    if model_type == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 4, "n_head": 4, "vocab_size": 64}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))
    return model, torch.randint(1, 64, (3, 9))


def network(kind):
    """A model, what it reads, the mixture's place and how many feed-forward networks it has."""
    if kind == "clip":
        return *vision(CLIPVisionConfig, CLIPVisionModel), "encoders.0", 4
    if kind == "siglip":
        # The attention pool at its end has a network of its own.
        return *vision(SiglipVisionConfig, SiglipVisionModel), "encoders.0", 5
    if kind == "projector":
        return nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 24)), torch.randn(2, 5, 32), kind, 1
    return *decoder(kind), "language_model", 4


@pytest.mark.parametrize(
    "kind", ["llama", "phi", "gpt2", "stablelm", "phi3", "gpt_neox", "clip", "siglip", "projector"]
)
def test_a_model_that_became_a_mixture_answers_as_before(kind):
    """Found by what they compute: these families call their Linears by a dozen names."""
    torch.manual_seed(0)
    model, x, place, networks = network(kind)
    model = model.eval()
    before = model(x)
    holder = nn.Module()
    holder.add_module(place.partition(".")[0], nn.ModuleList([model]) if "." in place else model)
    config = getattr(model, "config", LlamaConfig())
    layers = upcycle(
        holder, ExpertSettings(place=place, layers="all"), config, causal=place == "language_model"
    )
    after = holder.get_submodule(place)(x)
    assert len(layers) == networks
    pairs = (
        [(before, after)]
        if isinstance(before, torch.Tensor)
        else zip(before.values(), after.values(), strict=True)
    )
    compared = [(a - b).abs().max() for a, b in pairs if isinstance(a, torch.Tensor)]
    assert compared
    assert max(compared) <= 1e-6
