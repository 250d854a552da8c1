"""Weights in 4 bits: which levels they take, that they stay, and what a product keeps."""

import pytest
import torch
import torch.nn.functional as F

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
