"""Encoders and channel concatenation against tensors made by the authors' own code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from vlmix.core.parts import ENCODERS, FUSIONS
from vlmix.encoders._pixels import CLIP_MEAN, CLIP_STD, encoder_input
from vlmix.encoders.clip import ClipSettings
from vlmix.encoders.convnext import ConvnextSettings
from vlmix.fusion.channel_concat import ChannelConcatSettings

GOLDENS = Path(__file__).parents[2].parent / "shared" / "goldens"
pytestmark = [
    pytest.mark.parity,
    pytest.mark.golden,
    pytest.mark.skipif(not GOLDENS.is_dir(), reason="the shared golden folders are absent"),
]


def build(settings):
    return ENCODERS.get(settings.kind)(settings).eval()


def canonical(normalised):
    mean, std = (torch.tensor(colour)[:, None, None] for colour in (CLIP_MEAN, CLIP_STD))
    return normalised * std + mean


def assert_agree(found, golden):
    torch.testing.assert_close(found, golden, atol=5e-5, rtol=0)


def test_mini_gemini_towers_agree_with_the_authors_code():
    folder = GOLDENS / "mgm-llama"
    golden, inputs = load_file(folder / "outputs.safetensors"), load_file(folder / "inputs.safetensors")
    pixels = canonical(inputs["images_aux"])
    clip = ClipSettings(image_size=56, patch_size=14, width=48, layers=4, heads=4, mlp=96, resize="bilinear")
    low = build(clip)
    low.load_weights(str(folder / "OpenAI" / "clip-vit-tiny-patch14-56"))
    assert_agree(low(pixels).tokens, golden["vision_tower.features"])
    convnext = ConvnextSettings(image_size=64, depths=(1, 1, 2, 1), widths=(16, 24, 32, 48))
    high = build(convnext)
    high.load_weights(str(folder / "OpenAI" / "openclip-convnext-large-d-320-tiny"))
    assert_agree(high(pixels).to_nchw(), golden["vision_tower_aux.features"])


def test_eagle_towers_and_channel_concat_agree_with_the_authors_code():
    folder = GOLDENS / "eagle-x2-clip-convnext"
    golden, inputs = load_file(folder / "outputs.safetensors"), load_file(folder / "inputs.safetensors")
    weights, pixels = load_file(folder / "model.safetensors"), canonical(inputs["images"])

    def tower(number):
        prefix = f"model.vision_tower.vision_towers.{number}.vision_tower."
        return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}

    clip = build(
        ClipSettings(
            image_size=84,
            patch_size=14,
            width=48,
            layers=3,
            heads=4,
            mlp=96,
            feature_layer=-1,
            class_token="drop_before",
            resize="bilinear_corners",
        )
    )
    state = {k.removeprefix("vision_model."): v for k, v in tower(0).items() if "post_layernorm" not in k}
    name = "embeddings.position_embedding.weight"
    table = state[name][1:].T.unflatten(1, (5, 5))[None]
    resampled = F.interpolate(table, size=(6, 6), mode="bicubic", antialias=True, align_corners=False)
    state[name] = torch.cat([state[name][:1], resampled[0].flatten(1).T])
    clip.tower.load_state_dict(state)
    convnext = build(
        ConvnextSettings(
            image_size=256, depths=(1, 1, 2, 1), widths=(16, 24, 32, 48), stages=(3,), norm_eps=1e-5
        )
    )
    # The authors' loader renames every `gamma` to `weight`.
    ours = convnext.tower.state_dict()
    trunk = {k: v for k, v in tower(1).items() if not k.startswith("head.")}
    convnext.tower.load_state_dict({k: trunk.get(k, trunk.get(k.replace("gamma", "weight"))) for k in ours})
    assert_agree(encoder_input(pixels, clip.settings, torch.float32), golden["encoder.clip.input"])
    assert_agree(clip(pixels).tokens, golden["encoder.clip-448.out"])
    assert_agree(convnext(pixels).tokens, golden["encoder.convnext-1024.out"])
    concat = ChannelConcatSettings(grid=(8, 8), resampling="bilinear_corners")
    fused = FUSIONS.get("channel_concat")(concat, [clip.spec, convnext.spec])
    assert_agree(fused([clip, convnext], pixels).tokens, golden["fused_features"])
