"""Patch mining on levels as they are against patch mining on their stack: the same numbers, less memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlmix.core.parts import ENCODERS
from vlmix.core.tensors import FeatureMap, VisionSpec
from vlmix.fusion import _levels
from vlmix.fusion._native import mine_levels
from vlmix.fusion.patch_mining import PatchMining, PatchMiningSettings

pytestmark = pytest.mark.parity


def stack(levels, grid):
    """What the encoder's map is; not by ``resampled``, which works in float32."""
    maps = [F.interpolate(level.to_nchw(), size=grid, mode="bilinear") for level in levels]
    return FeatureMap.from_nchw(torch.cat(maps, dim=1))


def make(grid, window, cells, channels, heads=1, *, dtype=torch.float64, seed=0, images=2, offset=0.0):
    """A mining of ``grid`` whose second map has levels of ``cells`` rows and columns a window."""
    torch.manual_seed(seed)
    fine = (grid[0] * window[0], grid[1] * window[1])
    sides = [(grid[0] * rows, grid[1] * columns) for rows, columns in cells]
    specs = tuple(VisionSpec(side, count) for side, count in zip(sides, channels, strict=True))
    low = VisionSpec(grid, heads * 3)
    part = PatchMining(
        PatchMiningSettings(heads=heads), [low, VisionSpec(fine, sum(channels), levels=specs)]
    ).to(dtype)
    assert part.native
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)

    def draw(spec):
        tokens = torch.randn(images, spec.tokens, spec.channels, dtype=dtype) + offset
        return FeatureMap(tokens.requires_grad_(), spec.grid)

    return part, draw(low), [draw(spec) for spec in specs], fine


def both_ways(part, low, levels, fine):
    """Output and gradients of maps and live parameters, on the levels and on their stack."""
    live = [p for name, p in part.named_parameters() if name not in part.inert_parameters]
    leaves = [low.tokens, *(level.tokens for level in levels), *live]
    direction = torch.randn(low.tokens.shape, generator=torch.Generator().manual_seed(5)).to(low.tokens)
    for out in (part.merge_levels(low, levels), part.merge([low, stack(levels, fine)])):
        yield [out.tokens, *torch.autograd.grad((out.tokens * direction).sum(), leaves)]


def largest_difference(*case):
    return max(
        ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()
        for a, b in zip(*both_ways(*case), strict=True)
    )


side = st.integers(1, 4)


@settings(max_examples=40, deadline=None)
@given(
    grid=st.tuples(side, side),
    window=st.tuples(side, side),
    cells=st.lists(st.tuples(side, side), min_size=1, max_size=3),
    heads=st.integers(1, 3),
    step=st.sampled_from([1, 200, 1 << 22]),
    block=st.integers(1, 20),
    seed=st.integers(0, 1000),
)
def test_equals_mining_on_the_stack(grid, window, cells, heads, step, block, seed):
    """Any sizes: also levels finer than the map, or of its grid on one side only. 1e-9 in float64."""
    before = _levels._STEP_CPU, _levels._BLOCK_CPU
    _levels._STEP_CPU, _levels._BLOCK_CPU = step, block
    try:
        channels = [2 + (seed + i) % 5 for i in range(len(cells))]
        assert largest_difference(*make(grid, window, cells, channels, heads, seed=seed)) < 1e-9
    finally:
        _levels._STEP_CPU, _levels._BLOCK_CPU = before


def test_float32_stays_within_rounding():
    """Sums over 720 channels of numbers near 1 carry about sqrt(720) * 6e-8 = 2e-6 each."""
    cells = [(8, 8), (4, 4), (2, 2), (1, 1)]
    case = make((4, 4), (8, 8), cells, [48, 96, 192, 384], dtype=torch.float32)
    assert largest_difference(*case) < 3e-5


def test_a_large_common_offset_costs_no_more_digits_than_the_input_has():
    """At an offset of 300 the input itself is rounded to 300 * 6e-8 = 2e-5 of the numbers' spread."""
    case = make((2, 2), (4, 4), [(4, 4), (2, 2), (1, 1)], [32, 32, 32], dtype=torch.float32, offset=300.0)
    part, low, levels, fine = case
    found = part.merge_levels(low, levels).tokens
    exact_levels = [FeatureMap(level.tokens.double(), level.grid) for level in levels]
    exact = part.double().merge([FeatureMap(low.tokens.double(), low.grid), stack(exact_levels, fine)]).tokens
    assert (found - exact).abs().max() < 2e-3


def test_half_precision_follows_the_exact_result():
    part, low, levels, fine = make((4, 4), (4, 4), [(4, 4), (1, 1)], [24, 24], dtype=torch.float32)
    exact = part.merge([low, stack(levels, fine)]).tokens
    part = part.bfloat16()
    half = [FeatureMap(m.tokens.detach().bfloat16().requires_grad_(), m.grid) for m in (low, *levels)]
    found = part.merge_levels(half[0], half[1:]).tokens
    assert found.dtype == torch.bfloat16
    assert (found - exact).abs().mean() / exact.abs().mean() < 0.02
    found.float().square().mean().backward()
    assert all(m.tokens.grad is not None and m.tokens.grad.isfinite().all() for m in half)


def test_the_kernel_passes_gradcheck():
    torch.manual_seed(0)
    shapes = [((4, 6), 3), ((2, 3), 2)]
    leaves = [
        torch.randn(1, rows * columns, c, dtype=torch.float64, requires_grad=True)
        for (rows, columns), c in shapes
    ]
    queries = torch.randn(1, 6, 2, 5, dtype=torch.float64, requires_grad=True)

    def mined(q, *tokens):
        levels = [FeatureMap(t, grid) for t, (grid, _) in zip(tokens, shapes, strict=True)]
        return mine_levels(levels, q, (2, 3), (2, 2), 1e-5)

    assert torch.autograd.gradcheck(mined, (queries, *leaves))


class Largest(TorchDispatchMode):
    """Remembers the largest tensor any operation gave that is no view of another."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [
            t.untyped_storage().nbytes() // t.element_size() for t in tree_leaves(out) if torch.is_tensor(t)
        ]
        self.numbers = max([self.numbers, *sizes])
        return out


def test_no_tensor_of_the_stacks_size_is_made_and_frozen_levels_get_no_gradient():
    cells, channels = [(8, 8), (4, 4), (2, 2), (1, 1)], [8, 16, 32, 64]
    part, low, levels, fine = make((6, 6), (8, 8), cells, channels, dtype=torch.float32, images=1)
    stacked = fine[0] * fine[1] * sum(channels)
    with Largest() as seen:
        part.merge_levels(low, levels).tokens.sum().backward()
    assert levels[0].tokens.numel() <= seen.numbers < stacked / 4
    frozen = [FeatureMap(level.tokens.detach(), level.grid) for level in levels]
    part.merge_levels(low, frozen).tokens.sum().backward()
    assert all(level.tokens.grad is None for level in frozen)


def convnext(**changes):
    torch.manual_seed(2)
    cls = ENCODERS.get("convnext")
    part = cls(cls.settings_class.tiny().model_copy(update=changes)).double().eval()
    return part, cls.promise(part.settings)


class Low:
    """Stands for the first encoder."""

    def __init__(self, spec):
        self.tokens = torch.randn(2, spec.tokens, spec.channels, dtype=torch.float64)
        self.grid = spec.grid

    def __call__(self, pixel_values):
        return FeatureMap(self.tokens, self.grid)


@pytest.mark.parametrize(
    ("grid", "changes", "native"),
    [
        ((1, 1), {}, True),
        ((2, 2), {"stages": (0, 1, 2)}, True),
        ((2, 2), {}, False),
        ((2, 2), {"stages": (0,)}, False),
    ],
    ids=["four stages", "three stages", "one is no whole multiple", "one stage"],
)
def test_with_an_encoder_either_way_gives_the_same(grid, changes, native):
    encoder, spec = convnext(**changes)
    low = Low(VisionSpec(grid, 6))
    parts = [
        PatchMining(PatchMiningSettings(native=wanted), [VisionSpec(grid, 6), spec]).double()
        for wanted in (True, False)
    ]
    assert [part.native for part in parts] == [native, False]
    parts[1].load_state_dict(parts[0].state_dict())
    pixels = torch.rand(2, 3, 32, 32)
    found, expected = (part([low, encoder], pixels).tokens for part in parts)
    torch.testing.assert_close(found, expected)


def test_a_resampled_encoder_has_no_levels():
    settings = ENCODERS.get("convnext").settings_class.tiny()
    raw = {**settings.model_dump(), "resample": {"grid": (4, 4)}}
    encoder = ENCODERS.get("convnext")(type(settings).model_validate(raw)).eval()
    assert encoder.promise(encoder.settings).levels == ()
    assert encoder.spec.levels
    assert [level.grid for level in encoder.levels(torch.rand(1, 3, 32, 32))] == [(4, 4)]
