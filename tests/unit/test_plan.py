"""What `vlmix plan` counts equals what a built model has and does."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.tiny import DECODERS, config, text_config
from vlmix.models.flops import flop_counter
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.models.plan import parameter_count, plan_model


@pytest.mark.parametrize("model_type", DECODERS)
@torch.no_grad()
def test_counts_equal_the_built_model(model_type):
    settings = config(model_type)
    cost = plan_model(settings, images=2, text_tokens=5, dtype=torch.float32)
    network = VlmixForConditionalGeneration(settings).eval()
    assert cost.parameters == parameter_count(network)
    assert cost.weight_bytes == 4 * cost.parameters
    tokens = network.get_image_features(torch.rand(1, 3, 32, 32)).pooler_output
    assert tokens.shape[1] == cost.vision.tokens == settings.image_seq_length
    assert cost.prompt_tokens == 2 * cost.vision.tokens + 5
    # Torch before 2.15 counts nothing for the CPU's own attention kernel.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network.get_image_features(torch.rand(2, 3, 32, 32))
        out = network.model.language_model(
            inputs_embeds=torch.rand(1, cost.prompt_tokens, settings.width), logits_to_keep=1, use_cache=True
        )
    assert cost.prefill_flops == pytest.approx(counter.get_total_flops(), rel=1e-6)
    cached = sum(t.numel() * 4 for layer in out.past_key_values.layers for t in (layer.keys, layer.values))
    assert cost.cache_bytes == cached
    assert 0 < cost.decode_flops < cost.parts[-1].flops


def test_activation_memory_grows_with_rows_and_shrinks_with_freezing():
    from vlmix.models.plan import shape_only, training_bytes

    network = shape_only(config(), torch.float32).train()
    one, two = (training_bytes(network, rows=n, images=1, text_tokens=8) for n in (1, 2))
    assert 1.7 * one < two < 2.1 * one
    network.model.encoders.requires_grad_(False)
    assert training_bytes(network, rows=1, images=1, text_tokens=8) < one


def test_depthwise_convolutions_and_grouped_experts_are_counted_for_what_they_do():
    with torch.device("meta"):
        x_ICHW = torch.empty(1, 64, 32, 32, requires_grad=True)
        for groups in (1, 64):
            layer = torch.nn.Conv2d(64, 64, 7, padding=3, groups=groups)
            with flop_counter() as forward:
                layer(x_ICHW)
            with flop_counter() as both:
                layer(x_ICHW).sum().backward()
            assert forward.get_total_flops() == 2 * 64 * 32 * 32 * (64 // groups) * 49
            assert both.get_total_flops() == 3 * forward.get_total_flops()
    shared = {key: value for key, value in text_config().items() if key != "model_type"}
    flops = []
    for kind, more in (("llama", {}), ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2})):
        settings = config()
        settings.text_config = CONFIG_MAPPING[kind](**shared, **more)
        flops.append(plan_model(settings, text_tokens=5).parts[-1].flops)
    layers, tokens, expert, router = 2, 16 + 5, 3 * 32 * 48, 32 * 4
    assert flops[1] - flops[0] == 2 * layers * tokens * (expert + router)


def test_experts_are_counted_in_all_and_as_one_token_meets_them():
    dense = config("stablelm")
    sparse = config("stablelm")
    sparse.experts = [{"layers": [0], "count": 3, "router": {"kind": "topk", "k": 1}}]
    before, after = plan_model(dense), plan_model(sparse)
    assert before.active == before.parameters
    assert before.mixtures == ()
    assert after.parameters > after.active
    router = after.active - before.active
    assert router == 3 * dense.width
    (mixture,) = after.mixtures
    assert (mixture.place, mixture.experts, mixture.chosen) == ("language_model", (3,), 1)
