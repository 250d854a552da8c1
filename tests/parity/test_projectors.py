"""Projectors against the models whose layout they take, and what their plans refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.internvl.modeling_internvl import InternVLModel

from vlmix.core.errors import PlanError
from vlmix.core.tensors import FeatureMap, VisionSpec
from vlmix.projectors.mlp import MlpProjector, MlpSettings
from vlmix.projectors.pixel_shuffle import PixelShuffle, PixelShuffleSettings

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("factor", [2, 3])
def test_pixel_shuffle_orders_channels_as_its_models_do(factor):
    x_IHWC = torch.randn(2, 6, 6, 5)
    features, grid = FeatureMap(x_IHWC.flatten(1, 2), (6, 6)), (6 // factor, 6 // factor)
    token_major = features.joined(grid, "token_major").tokens
    idefics = Idefics3Connector.pixel_shuffle(None, features.tokens, factor)
    assert torch.equal(token_major, idefics)
    if factor == 2:
        assert torch.equal(token_major, InternVLModel.pixel_shuffle(None, x_IHWC, 0.5).flatten(1, 2))
    unshuffled = F.pixel_unshuffle(features.to_nchw(), factor)
    channel_major = features.joined(grid, "channel_major").tokens
    assert torch.equal(channel_major, FeatureMap.from_nchw(unshuffled).tokens)
    unfolded = F.unfold(features.to_nchw(), factor, stride=factor).mT
    assert torch.equal(channel_major, unfolded)


def test_pixel_shuffle_joins_neighbours_of_a_grid_that_is_not_square():
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")
    features = FeatureMap(torch.stack([rows, columns], -1).flatten(0, 1)[None], (4, 6))
    joined = features.joined((2, 3), "token_major").tokens[0, 4]
    assert joined.unflatten(0, (4, 2)).tolist() == [[2, 2], [2, 3], [3, 2], [3, 3]]


@pytest.mark.parametrize(
    ("grid", "words"),
    [((1, 16), "strip of 16 tokens"), ((4, 6), r"\(4, 6\) does not divide by factor 4"), ((5, 4), "divide")],
)
def test_pixel_shuffle_refuses_what_it_cannot_join(grid, words):
    with pytest.raises(PlanError, match=words):
        PixelShuffle.plan(PixelShuffleSettings(factor=4), VisionSpec(grid, 3), 8)


def test_mlp_is_llava_s_with_its_numbering():
    part = MlpProjector(MlpSettings(), VisionSpec((2, 2), 6), 10)
    assert list(part.layers.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    x = torch.randn(1, 4, 6)
    first, second = part.layers[0], part.layers[2]
    expected = second(F.gelu(first(x), approximate="none"))
    assert torch.equal(part(FeatureMap(x, (2, 2))).tokens, expected)
    assert len(MlpProjector(MlpSettings(depth=1), VisionSpec((2, 2), 6), 10).layers) == 1
