"""DINOv3, SAM and Pix2Struct against transformers' own models, through files; EVA-02 against itself."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import (
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Pix2StructImageProcessor,
    Pix2StructVisionConfig,
    Pix2StructVisionModel,
    SamVisionConfig,
    SamVisionModel,
)

from tests.parity.test_encoders import IDENTITY, OURS, PIXELS, SIZES, build, loaded, random_model
from vlmix.core.errors import CheckpointError, PlanError
from vlmix.core.parts import ENCODERS
from vlmix.encoders.dinov3 import Dinov3Settings
from vlmix.encoders.eva02 import Eva02Settings
from vlmix.encoders.pix2struct import Pix2structSettings
from vlmix.encoders.sam import SamSettings

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("layer", [-1, 2])
def test_dinov3_gives_transformers_hidden_states(tmp_path, gated, layer):
    config = DINOv3ViTConfig(**SIZES, intermediate_size=32, num_register_tokens=3, use_gated_mlp=gated)
    theirs = random_model(DINOv3ViTModel, config)
    theirs.save_pretrained(tmp_path)
    settings = Dinov3Settings(**OURS, mlp=32, registers=3, gated=gated, feature_layer=layer, **IDENTITY)
    part = loaded(settings, tmp_path)
    with torch.no_grad():
        out = theirs(PIXELS, output_hidden_states=True)
        expected = theirs.norm(out.hidden_states[layer])
    assert out.hidden_states[0].shape[1] == 1 + 3 + 16
    torch.testing.assert_close(part(PIXELS).tokens, expected[:, 4:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("neck", ["published", "first", "none"])
def test_sam_gives_transformers_map(tmp_path, neck):
    config = SamVisionConfig(
        **SIZES, mlp_dim=32, window_size=3, global_attn_indexes=[1, 3], output_channels=12
    )
    theirs = random_model(SamVisionModel, config)
    theirs.save_pretrained(tmp_path)
    settings = SamSettings(
        **OURS, mlp=32, window=3, global_blocks=(1, 3), neck=neck, neck_channels=12, **IDENTITY
    )
    part = loaded(settings, tmp_path)
    with torch.no_grad():
        tower = theirs.vision_encoder
        x = tower.patch_embed(PIXELS) + tower.pos_embed
        for layer in tower.layers:
            x = layer(x)
        expected = {
            "published": lambda: theirs(PIXELS).last_hidden_state,
            "first": lambda: tower.neck.layer_norm1(tower.neck.conv1(x.permute(0, 3, 1, 2))),
            "none": lambda: x.permute(0, 3, 1, 2),
        }[neck]()
    torch.testing.assert_close(part(PIXELS).to_nchw(), expected, atol=1e-5, rtol=1e-5)


def test_pix2struct_gives_what_the_published_processor_and_model_give(tmp_path):
    config = Pix2StructVisionConfig(
        hidden_size=16,
        patch_embed_hidden_size=48,
        d_ff=32,
        d_kv=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        seq_len=20,
    )
    theirs = random_model(Pix2StructVisionModel, config)
    theirs.save_pretrained(tmp_path)
    sizes = Pix2structSettings.tiny().model_copy(update={"positions": 20})
    part = loaded(sizes, tmp_path)
    levels = (PIXELS * 255).round().to(torch.uint8)
    process = Pix2StructImageProcessor(patch_size={"height": 4, "width": 4}, max_patches=18)
    pictures = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in levels]
    given = process(pictures, return_tensors="pt")
    # The first processor, and Eagle with it, divides by the deviation over n; torch's by the one over n - 1.
    n = levels[0].numel()
    given["flattened_patches"][..., 2:] *= (n / (n - 1)) ** 0.5
    with torch.no_grad():
        expected = theirs(**given).last_hidden_state[:, :16]
    torch.testing.assert_close(part(levels).tokens, expected, atol=1e-5, rtol=1e-4)


def test_a_window_as_large_as_the_grid_is_global_attention():
    """The rotations too: a grid of the size they were trained on is not squeezed."""
    wide = Eva02Settings.tiny().model_copy(update={"window": 4, "rope_grid": 4, "global_blocks": ()})
    whole = wide.model_copy(update={"global_blocks": (0, 1)})
    first, second = build(wide), build(whole)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.normal_(std=0.3)
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(first(PIXELS).tokens, second(PIXELS).tokens)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Dinov3Settings.tiny().model_copy(update={"table_size": 64}), "no position table"),
        (Dinov3Settings.tiny().model_copy(update={"heads": 8}), "multiple of 4"),
        (Eva02Settings.tiny().model_copy(update={"window": 3}), "whole number of windows of 3"),
        (Eva02Settings.tiny().model_copy(update={"heads": 8}), "multiple of 4"),
        (SamSettings.tiny().model_copy(update={"table_size": 64}), "leave out table_size"),
        (Pix2structSettings.tiny().model_copy(update={"positions": 4}), "too few for 4 rows"),
    ],
)
def test_sizes_that_cannot_work_are_refused_before_any_weight(settings, message):
    with pytest.raises(PlanError, match=message):
        ENCODERS.get(settings.kind).plan(settings)


@pytest.mark.parametrize("kind", ["dinov3", "sam", "eva02", "pix2struct"])
def test_a_folder_of_something_else_is_refused(tmp_path, kind):
    part = build(ENCODERS.get(kind).settings_class.tiny())
    with pytest.raises(CheckpointError):
        part.load_weights(str(tmp_path))
