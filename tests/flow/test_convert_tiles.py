"""LLaVA-NeXT: transformers' own model and LLaVA-1.6 folders, pictures of any shape, both ways."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)

from tests.tiny import text_config
from vlmix.convert.export import export
from vlmix.convert.run import convert
from vlmix.core.errors import CheckpointError
from vlmix.core.sample import ImageRef
from vlmix.models.image_processing import VlmixImageProcessor
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.train.recipe_file import with_overrides
from vlmix.views.anyres import Anyres, AnyresSettings
from vlmix.views.dynamic import Dynamic, DynamicSettings

pytestmark = pytest.mark.flow

PLACEHOLDER, SIDE = 60, 32
POINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]  # (height, width)
CHANGES = ["encoders.0.heads=4", f"image_token_id={PLACEHOLDER}"]
SIZES = [(50, 20), (20, 70), (40, 40)]


@pytest.fixture(scope="module")
def peer():
    """Transformers' LLaVA-NeXT with random weights."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=8,
    )
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=LlamaConfig(**text_config()),
        image_token_index=PLACEHOLDER,
        image_grid_pinpoints=POINTS,
    )
    return LlavaNextForConditionalGeneration(config).eval()


@pytest.fixture
def published(peer, tmp_path):
    """Its folder."""
    peer.save_pretrained(tmp_path / "published")
    return tmp_path / "published"


def loaded(folder):
    return VlmixForConditionalGeneration.from_pretrained(folder).eval()


def inputs(model):
    """Two rows, one with two pictures, as ours and as theirs."""
    processor = VlmixImageProcessor.of(model.config)
    pixels = torch.randint(0, 256, (3, 70, 70, 3), generator=torch.Generator().manual_seed(1))
    pictures = [
        ImageRef(Image.fromarray(image[:high, :wide].to(torch.uint8).numpy()))
        for image, (wide, high) in zip(pixels, SIZES, strict=True)
    ]
    opened = processor.open(pictures)
    counts = [processor.tokens(size) for size in SIZES]
    rows = [
        [2, 5, *[PLACEHOLDER] * counts[0], 7, *[PLACEHOLDER] * counts[1]],
        [2, *[PLACEHOLDER] * counts[2], 9],
    ]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    settings = model.model.encoders[0].settings
    mean, std = (torch.tensor(colour)[:, None, None] for colour in (settings.mean, settings.std))
    views = [processor.count(size) for size in SIZES]
    normalised = ((opened.pixel_values.float() / 255 - mean) / std).split(views)
    theirs = torch.zeros(3, max(views), 3, SIDE, SIDE)
    for number, found in enumerate(normalised):
        theirs[number, : len(found)] = found
    sizes = torch.tensor([(high, wide) for wide, high in SIZES])
    text = {"input_ids": ids, "attention_mask": mask}
    return {**text, **opened.named()}, {**text, "pixel_values": theirs, "image_sizes": sizes}


@torch.no_grad()
def test_transformers_llava_next_gives_the_same_logits_here_and_the_same_file_back(peer, published, tmp_path):
    assert convert(published, tmp_path / "ours").family == "llava_hf"
    model = loaded(tmp_path / "ours")
    ours, theirs = inputs(model)
    shown = ours["attention_mask"].bool()
    expected = peer(**theirs).logits[shown]
    # 1e-5: the same float32 arithmetic, rows of the batch multiplied in another order
    torch.testing.assert_close(model(**ours).logits[shown], expected, atol=1e-5, rtol=0)
    export(tmp_path / "ours", tmp_path / "back", "llava_hf")
    before, after = (load_file(folder / "model.safetensors") for folder in (published, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@torch.no_grad()
def test_the_layout_of_llavas_own_code_is_written_and_read(published, tmp_path):
    convert(published, tmp_path / "ours")
    model = loaded(tmp_path / "ours")
    model.save_pretrained(tmp_path / "trained")  # nothing is known about where it came from
    for family in ("llava", "llava_hf"):
        export(tmp_path / "trained", tmp_path / family, family)
    config = json.loads((tmp_path / "llava" / "config.json").read_text())
    assert config["image_grid_pinpoints"] == [[width, height] for height, width in POINTS]
    assert (config["image_aspect_ratio"], config["mm_patch_merge_type"]) == ("anyres", "spatial_unpad")
    again = convert(tmp_path / "llava", tmp_path / "again", change=lambda raw: with_overrides(raw, CHANGES))
    assert again.family == "llava"
    ours, _ = inputs(model)
    assert torch.equal(loaded(tmp_path / "again")(**ours).logits, model(**ours).logits)
    back = json.loads((tmp_path / "llava_hf" / "config.json").read_text())
    assert back["image_grid_pinpoints"] == POINTS
    with pytest.raises(CheckpointError, match="views of kind"):
        export(tmp_path / "trained", tmp_path / "other", "llava_hr")


@settings(max_examples=300, deadline=None)
@given(width=st.integers(1, 2000), height=st.integers(1, 2000))
def test_any_shape_is_cut_and_counted_as_transformers_does(width, height):
    cut, grid, side = AnyresSettings(), (24, 24), 336
    points = [[rows * side, columns * side] for rows, columns in cut.canvases]
    found = Anyres.tiling(cut, (width, height), side, grid)
    assert (found.rows, found.columns) == get_anyres_image_grid_shape((height, width), points, side)
    assert len(Anyres.boxes(cut, found)) == image_size_to_num_patches((height, width), points, side)
    large = torch.zeros(1, found.rows * grid[0], found.columns * grid[1])
    _, rows, columns = unpad_image(large, (height, width)).shape
    assert Anyres.tokens(cut, found, grid) == grid[0] * grid[1] + rows * (columns + 1)
    tiles = Dynamic.tiling(DynamicSettings(), (width, height), side, grid)
    assert (tiles.columns, tiles.rows) == get_optimal_tiled_canvas((height, width), (side, side), 1, 12)
