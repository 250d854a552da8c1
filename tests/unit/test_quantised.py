"""Weights in 4 bits: which levels they take, that they stay, and what a product keeps."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.utils.integrations import dequantize_bnb_weight

from vlmix.core.adapters import AdapterSettings
from vlmix.models.adapters import install_adapters, merged_tensors
from vlmix.models.quantised import LEVELS, Nf4Linear, dequantised, quantised


@pytest.mark.parametrize("shape", [(64, 32), (5, 7), (3, 128)])
def test_4_bits_are_the_nearest_levels_of_each_block_and_stay_as_they_are(shape):
    torch.manual_seed(2)
    weight = torch.randn(shape)
    weight[0] = 0.0
    packed, scales = quantised(weight)
    rounded = dequantised(packed, scales, shape)
    flat = torch.cat([weight.flatten(), torch.zeros(-weight.numel() % 64)]).view(-1, 64)
    levels = torch.tensor(LEVELS)
    steps = (flat[..., None] - levels * flat.abs().amax(1)[:, None, None]).abs().amin(-1)
    assert torch.allclose((rounded - weight).abs().flatten(), steps.flatten()[: weight.numel()], atol=1e-6)
    again = quantised(rounded)
    assert torch.equal(again[0], packed)
    assert torch.equal(again[1], scales)
    assert packed.nbytes == -(-weight.numel() // 2)


@pytest.mark.parity
def test_4_bits_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    torch.manual_seed(2)
    weight = torch.randn(48, 128)  # its own way back is wrong on CPUs where a row is shorter than a block
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    ours = quantised(weight)
    assert torch.equal(ours[0], packed.flatten())
    assert torch.equal(ours[1], state.absmax)
    assert torch.equal(dequantised(*ours, (48, 128)), functional.dequantize_4bit(packed, state))


@pytest.mark.parity
def test_an_adapter_on_4_bits_is_pefts_own_over_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes", reason="needs the extra `optim`")
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(128, 96), torch.randn(7, 128)
    theirs = torch.nn.ModuleList([bnb.nn.Linear4bit(128, 96, compress_statistics=False, quant_type="nf4")])
    theirs[0].load_state_dict(linear.state_dict())
    theirs.to("cpu").is_loaded_in_4bit = True
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules=r"\d+"), theirs, "adapter_0")
    ours = torch.nn.ModuleDict({"projector": torch.nn.ModuleList([linear])})
    settings = AdapterSettings(match=["projector.*"], rank=4, alpha=8, quantise="nf4")
    install_adapters(ours, None, [settings])
    layers = [theirs[0], ours["projector"][0]]
    assert type(layers[0]).__module__ == "peft.tuners.lora.bnb"
    found = []
    for layer in layers:
        torch.manual_seed(1)
        sides = [side["adapter_0"].weight for side in (layer.lora_A, layer.lora_B)]
        for side in sides:
            torch.nn.init.normal_(side, std=0.1)
        given = x.clone().requires_grad_()
        y = layer(given)
        y.square().sum().backward()
        found.append([y, given.grad, *(side.grad for side in sides)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    kept = {f"a.{name}": tensor for name, tensor in layers[1].state_dict().items()}
    weight = dequantize_bnb_weight(layers[0].base_layer.weight) + layers[0].get_delta_weight("adapter_0")
    assert torch.equal(merged_tensors(kept, [settings])["a.weight"], weight)


def test_a_product_in_4_bits_keeps_no_weight_for_its_gradient():
    linear = Nf4Linear(torch.nn.Linear(128, 64))
    x = torch.randn(2, 128, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = linear(x)
    y.square().sum().backward()
    assert max(tensor.nbytes for tensor in saved) == linear.packed.nbytes == 64 * 128 // 2
    (expected,) = torch.autograd.grad(F.linear(x, linear.weight, linear.bias).square().sum(), x)
    # The same products, added up in another order.
    assert torch.allclose(x.grad, expected, atol=1e-5)
    assert sum(parameter.numel() for parameter in linear.parameters()) == 64
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), y)
    with torch.inference_mode():
        assert torch.equal(linear(x), y)
