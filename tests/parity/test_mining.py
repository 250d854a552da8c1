"""Patch mining as it runs against the published formula: outputs, every gradient, memory, goldens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.autograd.graph import saved_tensors_hooks

from vlmix.core.errors import PlanError
from vlmix.core.tensors import FeatureMap, VisionSpec
from vlmix.fusion import _mining
from vlmix.fusion.patch_mining import PatchMining, PatchMiningSettings

pytestmark = pytest.mark.parity
GOLDEN = Path(__file__).parents[2].parent / "shared" / "goldens" / "mgm-llama"


def literal(part, low, high):
    """Window by window, head by head, with every key and value, as published."""
    (rows, columns), width = low.grid, low.tokens.shape[2]
    down, across = high.grid[0] // rows, high.grid[1] // columns
    map_IHWC = high.tokens.unflatten(1, high.grid)
    found = []
    for cell in range(rows * columns):
        top, left = cell // columns * down, cell % columns * across
        window_IMC = map_IHWC[:, top : top + down, left : left + across].flatten(1, 2)
        query_I1D = part.query(low.tokens[:, cell : cell + 1])
        key_IMD, value_IMD = part.key(window_IMC), part.value(window_IMC)
        heads = []
        for q, k, v in zip(*(t.chunk(part.heads, -1) for t in (query_I1D, key_IMD, value_IMD)), strict=True):
            weights_I1M = (q @ k.mT / (width / part.heads) ** 0.5).softmax(-1)
            heads.append(weights_I1M @ v)
        found.append(torch.cat(heads, -1))
    return low.tokens + torch.cat(found, 1)


def make(grid, window, channels, heads=1, *, dtype=torch.float64, seed=0, images=2, offset=0.0):
    torch.manual_seed(seed)
    low = VisionSpec(grid, channels[0])
    high = VisionSpec((grid[0] * window[0], grid[1] * window[1]), channels[1])
    part = PatchMining(PatchMiningSettings(heads=heads), [low, high]).to(dtype)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    maps = [torch.randn(images, spec.tokens, spec.channels, dtype=dtype) + offset for spec in (low, high)]
    return part, [
        FeatureMap(x.requires_grad_(), spec.grid) for x, spec in zip(maps, (low, high), strict=True)
    ]


def outputs_and_gradients(form, part, maps):
    live = [p for name, p in part.named_parameters() if name not in part.inert_parameters]
    out = form(part, *maps)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
    return [out, *torch.autograd.grad((out * direction).sum(), [m.tokens for m in maps] + live)]


def absorbed(part, low, high):
    return part.merge([low, high]).tokens


def largest_difference(part, maps):
    ours, theirs = (outputs_and_gradients(form, part, maps) for form in (absorbed, literal))
    return max(
        ((a - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in zip(ours, theirs, strict=True)
    )


side = st.integers(1, 4)


@settings(max_examples=40, deadline=None)
@given(
    grid=st.tuples(side, side),
    window=st.tuples(side, side),
    heads=st.integers(1, 3),
    per_head=st.integers(1, 5),
    channels=st.integers(2, 9),
    step=st.sampled_from([1, 100, 1 << 20]),
    seed=st.integers(0, 1000),
)
def test_equals_the_published_formula(grid, window, heads, per_head, channels, step, seed):
    if window == (1, 1):
        window = (1, 2)
    part, maps = make(grid, window, (heads * per_head, channels), heads, seed=seed)
    before, _mining._STEP_CPU = _mining._STEP_CPU, step
    try:
        assert largest_difference(part, maps) < 1e-9
    finally:
        _mining._STEP_CPU = before


def test_one_key_per_window_is_the_value_alone():
    part, (low, high) = make((3, 2), (1, 1), (4, 6))
    torch.testing.assert_close(absorbed(part, low, high), low.tokens + part.value(high.tokens))
    assert set(part.inert_parameters) == {
        f"{name}.{i}.{kind}" for name in ("query", "key") for i in (0, 1) for kind in ("weight", "bias")
    }


def test_float32_stays_within_rounding():
    """Sums over 720 channels of numbers near 1 carry about sqrt(720) * 6e-8 = 2e-6 each."""
    part, maps = make((4, 4), (8, 8), (64, 720), dtype=torch.float32)
    assert largest_difference(part, maps) < 3e-5


def test_a_large_common_offset_of_the_keys_costs_no_digits():
    """Scores are formed after the mean is gone; forming them before would lose them in the offset."""
    part, maps = make((2, 2), (4, 4), (8, 96), dtype=torch.float32, offset=300.0)
    exact = literal(part.double(), *(FeatureMap(m.tokens.double(), m.grid) for m in maps))
    assert (absorbed(part.float(), *maps) - exact).abs().max() < 2e-3


def test_the_kernel_passes_gradcheck():
    torch.manual_seed(0)
    keys = torch.randn(2, 2 * 3 * 4, 5, dtype=torch.float64, requires_grad=True)
    queries = torch.randn(2, 2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda k, q: _mining.mine_windows(k, q, (1, 2), (3, 4), 1e-5), (keys, queries)
    )


def test_layout_frozen_keys_and_autocast_change_nothing():
    part, (low, high) = make((3, 2), (2, 3), (6, 10), dtype=torch.float32)
    expected = absorbed(part, low, high)
    other = FeatureMap.from_nchw(high.to_nchw().detach().contiguous())
    assert not other.tokens.is_contiguous()
    torch.testing.assert_close(absorbed(part, low, other), expected)
    absorbed(part, low, other).sum().backward()
    assert low.tokens.grad is not None
    queries = torch.randn(2, 6, 1, 10)
    plain = _mining.mine_windows(high.tokens, queries, (3, 2), (2, 3), 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(_mining.mine_windows(high.tokens, queries, (3, 2), (2, 3), 1e-5), plain)


def test_half_precision_follows_the_exact_result():
    part, maps = make((4, 4), (4, 4), (32, 48))
    exact = literal(part, *maps)
    half = [FeatureMap(m.tokens.bfloat16(), m.grid) for m in maps]
    found = absorbed(part.bfloat16(), *half)
    assert (found - exact).abs().mean() / exact.abs().mean() < 0.02


def test_no_second_tensor_of_the_maps_size_is_kept():
    part, maps = make((4, 4), (8, 8), (8, 64), dtype=torch.float32)
    large, seen = maps[1].tokens.numel(), set()

    def keep(tensor):
        if tensor.numel() >= large:
            seen.add(tensor.untyped_storage().data_ptr())
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        absorbed(part, *maps)
    assert seen == {maps[1].tokens.untyped_storage().data_ptr()}


def test_nothing_hides_a_number_that_is_not_finite():
    part, (low, high) = make((2, 2), (2, 2), (4, 6))
    with torch.no_grad():
        high.tokens[0, 0, 0] = float("nan")
    out = absorbed(part, low, high)
    assert out[0, 0].isnan().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        ([VisionSpec((4, 4), 8)], "takes two encoders"),
        ([VisionSpec((4, 4), 8), VisionSpec((6, 8), 8)], r"\(6, 8\) does not divide into \(4, 4\)"),
        ([VisionSpec((4, 4), 8), VisionSpec((2, 2), 8)], "does not divide"),
        ([VisionSpec((4, 4), 9), VisionSpec((8, 8), 8)], "2 heads do not share 9 channels"),
    ],
)
def test_the_plan_refuses_what_cannot_be_mined(specs, words):
    with pytest.raises(PlanError, match=words):
        PatchMining.plan(PatchMiningSettings(heads=2), specs)


@pytest.mark.golden
@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the shared golden folder mgm-llama is absent")
def test_agrees_with_the_authors_own_code():
    weights = load_file(GOLDEN / "model.safetensors")
    golden = load_file(GOLDEN / "outputs.safetensors")
    high = FeatureMap.from_nchw(golden["vision_tower_aux.features"])
    low = FeatureMap(golden["vision_tower.features"], (4, 4))
    part = PatchMining(PatchMiningSettings(), [VisionSpec(m.grid, m.tokens.shape[2]) for m in (low, high)])
    theirs = {"query": "query", "key": "aux", "value": "val"}
    part.load_state_dict(
        {
            name: weights[f"model.vlm_uni_{theirs[name.split('.')[0]]}_projector.{name.split('.', 1)[1]}"]
            for name in part.state_dict()
        }
    )
    mined = part.merge([low, high]).tokens - low.tokens
    torch.testing.assert_close(mined, golden["resampler.0.mined"], atol=5e-5, rtol=0)
