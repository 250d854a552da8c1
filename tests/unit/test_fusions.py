"""What is particular to one fusion: token order, which encoders run, grids, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vlmix.core.errors import PlanError
from vlmix.core.tensors import FeatureMap, VisionSpec
from vlmix.fusion.channel_concat import ChannelConcat, ChannelConcatSettings
from vlmix.fusion.deformable import Deformable, DeformableSettings
from vlmix.fusion.sequence_append import SequenceAppend, SequenceAppendSettings
from vlmix.fusion.single import Single, SingleSettings

A, B = VisionSpec((2, 2), 3), VisionSpec((4, 1), 3)


def ramp(spec, start):
    numbers = torch.arange(start, start + spec.tokens, dtype=torch.float32)
    return FeatureMap(numbers[None, :, None].expand(1, -1, spec.channels), spec.grid)


@pytest.mark.parametrize(
    ("order", "expected"),
    [("by_encoder", [0, 1, 2, 3, 10, 11, 12, 13]), ("interleaved", [0, 10, 1, 11, 2, 12, 3, 13])],
)
def test_sequence_append_orders_tokens_as_asked(order, expected):
    part = SequenceAppend(SequenceAppendSettings(order=order), [A, B])
    out = part.merge([ramp(A, 0), ramp(B, 10)])
    assert out.tokens[0, :, 0].tolist() == expected
    assert out.grid == (1, 8)


def test_single_runs_no_other_encoder():
    def refuse(_: Tensor) -> FeatureMap:
        raise AssertionError("this encoder was not asked for")

    part = Single(SingleSettings(which=1), [A, B])
    assert part([refuse, lambda _: ramp(B, 5)], torch.zeros(1, 3, 4, 4)).grid == B.grid


def test_channel_concat_takes_the_first_grid_and_the_chosen_resampling():
    high = FeatureMap(torch.randn(1, 16, 2), (4, 4))
    for resampling in ("bilinear", "bilinear_corners", "area"):
        settings = ChannelConcatSettings(resampling=resampling)
        part = ChannelConcat(settings, [A, VisionSpec((4, 4), 2)])
        out = part.merge([ramp(A, 0), high])
        assert torch.equal(out.tokens[..., 3:], high.resampled((2, 2), resampling).tokens)
        assert torch.equal(out.tokens[..., :3], ramp(A, 0).tokens)


def test_channel_concat_does_not_interpolate_along_a_strip():
    strip = VisionSpec((1, 5), 3)
    assert ChannelConcat.plan(ChannelConcatSettings(), [strip, strip]) == VisionSpec((1, 5), 6)
    assert ChannelConcat.plan(ChannelConcatSettings(), [A, VisionSpec((1, 1), 3)]).grid == A.grid
    for settings, specs in (({}, [strip, A]), ({}, [A, strip]), ({"grid": (2, 2)}, [strip])):
        with pytest.raises(PlanError, match="gives a strip of 5 tokens, which has no rows to bring"):
            ChannelConcat.plan(ChannelConcatSettings(**settings), specs)


class Scaled:
    """Stands for an encoder that sees at the given scales; its map is not asked for."""

    def __init__(self, *specs):
        self.maps = [ramp(spec, 7.0) for spec in specs]

    def __call__(self, pixel_values):
        assert len(self.maps) == 1, "the stack was asked for"
        return self.maps[0]

    def levels(self, pixel_values):
        return self.maps


def test_deformable_reads_each_encoders_levels_in_order():
    levels = (VisionSpec((4, 4), 2), VisionSpec((2, 2), 5))
    specs = [VisionSpec((2, 2), 8), VisionSpec((4, 4), 7, levels=levels), VisionSpec((3, 3), 4)]
    pixels, encoders = torch.zeros(1, 3, 8, 8), [Scaled(specs[0]), Scaled(*levels), Scaled(specs[2])]
    part = Deformable(DeformableSettings(heads=2), specs)
    assert [linear.in_features for linear in part.attention.values] == [2, 5, 4]
    part.gain.data.fill_(1.0)
    expected = part.merge([encoders[0].maps[0], *encoders[1].maps, *encoders[2].maps])
    assert torch.equal(part(encoders, pixels).tokens, expected.tokens)
    alone = Deformable(DeformableSettings(heads=2, levels=False), specs)
    assert [linear.in_features for linear in alone.attention.values] == [7, 4]
    with pytest.raises(AssertionError, match="the stack was asked for"):
        alone(encoders, pixels)


@pytest.mark.parametrize(
    ("cls", "settings", "specs", "words"),
    [
        (SequenceAppend, SequenceAppendSettings(), [A, VisionSpec((2, 2), 4)], "set `width`"),
        (
            SequenceAppend,
            SequenceAppendSettings(order="interleaved"),
            [A, VisionSpec((3, 3), 3)],
            "take turns",
        ),
        (Single, SingleSettings(which=2), [A, B], "there is no encoder 2"),
        (ChannelConcat, ChannelConcatSettings(), [], "there is no encoder"),
    ],
)
def test_refusals_say_what_to_do(cls, settings, specs, words):
    with pytest.raises(PlanError, match=words):
        cls.plan(settings, specs)
