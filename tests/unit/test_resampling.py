"""An encoder's map on another grid: what is promised is what comes, and joining neighbours loses nothing."""

import pytest
import torch
import torch.nn.functional as F

from tests import tiny
from vlmix.core.errors import PlanError
from vlmix.core.parts import ENCODERS, read_part
from vlmix.core.resampling import ResampleSettings
from vlmix.core.tensors import FeatureMap, VisionSpec
from vlmix.models.configuration import VlmixConfig

MODES = ["bilinear", "bilinear_corners", "area", "token_major", "channel_major"]


def clip(**resample):
    raw = {**tiny.part(ENCODERS, "clip"), "resample": resample}
    return read_part(ENCODERS, raw)


@pytest.mark.parametrize("mode", MODES)
def test_the_promise_is_kept(mode):
    settings = clip(grid=(2, 2), mode=mode)
    promised = ENCODERS.get("clip").promise(settings)
    found = ENCODERS.get("clip")(settings).eval()(torch.rand(3, 3, 32, 32))
    assert (found.grid, found.tokens.shape[-1]) == (promised.grid, promised.channels)
    assert promised.channels == (4 * 16 if mode.endswith("major") else 16)
    assert not promised.token_blocks


def test_channel_major_is_pixel_unshuffle_and_token_major_keeps_tokens_whole():
    found = FeatureMap(torch.rand(2, 24, 5), (4, 6))
    torch.testing.assert_close(
        found.joined((2, 3), "channel_major").to_nchw(), F.pixel_unshuffle(found.to_nchw(), 2)
    )
    joined = found.joined((2, 3), "token_major").tokens
    torch.testing.assert_close(joined[:, 0], found.tokens[:, [0, 1, 6, 7]].flatten(1))
    windows = found.windows((2, 2))
    torch.testing.assert_close(joined, windows.flatten(2))


def test_what_cannot_be_joined_is_refused_before_any_weight():
    with pytest.raises(PlanError, match=r"\(4, 4\) does not divide into \(3, 3\)"):
        ENCODERS.get("clip").promise(clip(grid=(3, 3), mode="token_major"))
    with pytest.raises(ValueError, match="does not divide"):
        FeatureMap(torch.rand(1, 16, 2), (4, 4)).joined((3, 3), "token_major")
    with pytest.raises(ValueError, match="no whole number of windows"):
        FeatureMap(torch.rand(1, 16, 2), (4, 4)).windows((3, 3))
    assert ResampleSettings(grid=(3, 3)).plan(VisionSpec((4, 4), 7)) == VisionSpec((3, 3), 7)


def test_a_model_with_resampled_encoders_plans_and_runs():
    base = tiny.config(fusion={"kind": "channel_concat"})
    encoders = [{**raw, "resample": {"grid": [2, 2], "mode": "token_major"}} for raw in base.encoders]
    config = VlmixConfig(**{**base.to_dict(), "encoders": encoders})
    assert config.plan().fused == VisionSpec((2, 2), sum(4**k * c for k, c in ((1, 16), (2, 28))))
    model = tiny.VlmixForConditionalGeneration(config).eval()
    with torch.no_grad():
        tokens = model.get_image_features(torch.rand(1, 3, 32, 32)).pooler_output
    assert tokens.shape == (1, config.image_seq_length, config.width)


def test_a_fusion_inside_the_backbone_refuses_a_resampled_one():
    base = tiny.config()
    encoders = [{**raw, "resample": {"grid": [4, 4]}} for raw in base.encoders]
    fusion = {"kind": "mixture_of_resolution", "after": [1]}
    with pytest.raises(PlanError, match="pass tokens on"):
        VlmixConfig(**{**base.to_dict(), "encoders": encoders, "fusion": fusion}).plan()
