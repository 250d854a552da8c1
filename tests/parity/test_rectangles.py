"""Rectangular pictures through SigLIP 2 and Pix2Struct against transformers' own processors and models.

A batch has one shape here, so nothing is padding; there the same patches stand among masked ones.
"""

from __future__ import annotations

import pytest
import torch
from transformers import (
    Pix2StructImageProcessor,
    Pix2StructVisionConfig,
    Pix2StructVisionModel,
    Siglip2ImageProcessor,
)

from tests.parity.test_encoders import OURS, build, loaded, random_model
from tests.parity.test_swin_siglip2_radio import siglip2_model
from tests.tiny import switch_checkpointing_on
from vlmix.core.errors import ImageError
from vlmix.core.tensors import FeatureMap
from vlmix.encoders.pix2struct import Pix2structSettings
from vlmix.encoders.siglip2 import Siglip2Settings

pytestmark = pytest.mark.parity

SHAPES = [(40, 24), (24, 40), (17, 91), (33, 32), (7, 200), (300, 11)]
# The two frameworks' sums run over different numbers of slots, masked ones included.
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def pictures(height, width):
    return torch.randint(0, 256, (2, 3, height, width), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )


def planned(tokens, grid):
    return FeatureMap(tokens[:, : grid[0] * grid[1]], grid).resampled((4, 4)).tokens


@pytest.mark.parametrize("shape", SHAPES)
def test_siglip2_sees_a_rectangle_as_published(tmp_path, shape):
    theirs = siglip2_model(composite=False)
    theirs.save_pretrained(tmp_path)
    part = loaded(Siglip2Settings(**OURS, mlp=32, table_size=32), tmp_path)
    levels = pictures(*shape)
    # Given as floats, because the processor rounds resized uint8 pictures to whole levels; ours does not.
    process = Siglip2ImageProcessor(patch_size=8, max_num_patches=16, do_rescale=False)
    given = process(list(levels.float() / 255), return_tensors="pt")
    grid = tuple(given["spatial_shapes"][0].tolist())
    with torch.no_grad():
        expected = theirs(**given).last_hidden_state
    assert grid != (4, 4) or shape == (33, 32)
    assert (part.embed(levels).ndim == 3) == (grid == (4, 4))
    torch.testing.assert_close(part(levels).tokens, planned(expected, grid), **CLOSE)


def pix2struct(folder):
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
    theirs.save_pretrained(folder)
    return theirs, loaded(Pix2structSettings.tiny().model_copy(update={"positions": 20}), folder)


@pytest.mark.parametrize("shape", SHAPES)
def test_pix2struct_sees_a_rectangle_as_published(tmp_path, shape):
    theirs, part = pix2struct(tmp_path)
    levels = pictures(*shape)
    process = Pix2StructImageProcessor(patch_size={"height": 4, "width": 4}, max_patches=18)
    given = process(list(levels), return_tensors="pt")
    # As in the square's test: this processor divides by the deviation over n - 1, the first one over n.
    n = levels[0].numel()
    given["flattened_patches"][..., 2:] *= (n / (n - 1)) ** 0.5
    grid = tuple(int(line.max()) for line in given["flattened_patches"][0, :, :2].T)
    with torch.no_grad():
        expected = theirs(**given).last_hidden_state
    assert (part.embed(levels).ndim == 3) == (grid == (4, 4))
    torch.testing.assert_close(part(levels).tokens, planned(expected, grid), **CLOSE)


@pytest.mark.parametrize("shape", [*SHAPES, (1, 1), (1, 999), (1000, 1024), (720, 1280)])
@pytest.mark.parametrize("patches", [18, 256, 2048])
def test_pix2struct_counts_patches_as_published(shape, patches):
    part = build(Pix2structSettings.tiny().model_copy(update={"patches": patches, "positions": patches + 1}))
    process = Pix2StructImageProcessor(patch_size={"height": 4, "width": 4}, max_patches=patches)
    given = process(torch.zeros(3, *shape), return_tensors="pt", do_normalize=False)["flattened_patches"][0]
    x = part.embed(torch.zeros(1, 3, *shape))
    found = part.spec.grid if x.ndim == 3 else tuple(x.shape[1:3])
    assert found == tuple(int(line.max()) for line in given[:, :2].T)


def test_a_picture_longer_than_the_position_tables_is_refused():
    with pytest.raises(ImageError, match="18 x 1 patches, but there are positions for 17"):
        build(Pix2structSettings.tiny())(torch.zeros(1, 3, 400, 2))


@pytest.mark.parametrize("settings", [Pix2structSettings.tiny(), Siglip2Settings.tiny()])
def test_rectangles_run_block_by_block_in_bfloat16_and_under_checkpointing(settings):
    levels, part = pictures(40, 24), build(settings)
    x = part.embed(levels)
    for index in range(part.spec.blocks):
        x = part.block(index, x)
    assert torch.equal(part.finish(x).tokens, part(levels).tokens)
    expected = part(levels).tokens
    switch_checkpointing_on(part.tower)
    torch.testing.assert_close(part.train()(levels).tokens, expected)
    assert part.to(torch.bfloat16)(levels).tokens.dtype == torch.bfloat16
