"""Towers loaded from their own published folders, against tensors made by the authors' own code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlmix.core.parts import ENCODERS
from vlmix.encoders._pixels import CLIP_MEAN, CLIP_STD
from vlmix.encoders.clip import ClipSettings
from vlmix.encoders.convnext import ConvnextSettings

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
