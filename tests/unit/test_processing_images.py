"""The canonical image: square, 8-bit, and cheap whatever the picture's shape."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoImageProcessor

from vlmix.core.errors import ImageError, PlanError
from vlmix.core.sample import ImageRef
from vlmix.models.image_processing import VlmixImageProcessor, read_image

FITS = ["pad", "stretch", "crop"]


def left_right(width: int, height: int) -> Image.Image:
    """Left half white, right half black."""
    pixels_HW3 = np.zeros((height, width, 3), dtype=np.uint8)
    pixels_HW3[:, : width // 2] = 255
    return Image.fromarray(pixels_HW3)


def test_each_fit_does_what_it_says() -> None:
    wide = [ImageRef(left_right(32, 8))]
    padded, stretched, cropped = (VlmixImageProcessor(16, fit).open(wide).pixel_values[0] for fit in FITS)
    assert padded[:, 0, 0].tolist() == padded[:, 15, 15].tolist() == [122, 116, 104]
    assert (padded[0, 8, 0], padded[0, 8, 15]) == (255, 0)
    assert (stretched[:, :, 0] == 255).all()
    assert (stretched[:, :, 15] == 0).all()
    assert (cropped[0, :, 3] == 255).all()
    assert (cropped[0, :, 12] == 0).all()


def test_a_picture_of_the_right_size_is_not_touched() -> None:
    pixels_HW3 = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for fit in FITS:
        out = VlmixImageProcessor(16, fit).open([ImageRef(Image.fromarray(pixels_HW3))]).pixel_values
        assert np.array_equal(out[0].permute(1, 2, 0).numpy(), pixels_HW3)


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 90), height=st.integers(1, 90), fit=st.sampled_from(FITS))
def test_any_shape_gives_the_canonical_shape(width: int, height: int, fit: str) -> None:
    picture = ImageRef(Image.new("RGB", (width, height), (9, 9, 9)))
    out = VlmixImageProcessor(24, fit, pad_color=(9, 9, 9)).open([picture]).pixel_values
    assert (out.shape, out.dtype, out.is_contiguous()) == ((1, 3, 24, 24), torch.uint8, True)
    assert (out == 9).all()


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [(1, 40_000), (40_000, 1)])
def test_a_thread_of_a_picture_costs_little(fit: str, size: tuple[int, int], monkeypatch) -> None:
    largest = []
    new = Image.new
    monkeypatch.setattr(
        Image, "new", lambda mode, size, *rest: largest.append(size) or new(mode, size, *rest)
    )
    assert VlmixImageProcessor(8, fit).open([ImageRef(new("RGB", size))]).pixel_values.shape == (1, 3, 8, 8)
    assert all(width * height <= 36_000_000 for width, height in largest)


def test_the_hugging_face_call_and_its_errors(tmp_path) -> None:
    processor = VlmixImageProcessor(8)
    picture = Image.new("RGB", (5, 5))
    picture.save(tmp_path / "a.png")
    several = processor(
        [picture, str(tmp_path / "a.png"), tmp_path / "a.png", (tmp_path / "a.png").read_bytes()]
    )
    assert several["pixel_values"].shape == (4, 3, 8, 8)
    assert processor(picture)["pixel_values"].shape == (1, 3, 8, 8)
    assert processor([])["pixel_values"].shape == (0, 3, 8, 8)
    with pytest.raises(ImageError, match="unknown image options: do_resize"):
        processor(picture, do_resize=False)
    with pytest.raises(ImageError, match=r"picture 2 of 2: .* does not exist"):
        processor([picture, tmp_path / "b.png"])
    with pytest.raises(ImageError, match="not list"):
        read_image([picture])
    with pytest.raises(PlanError, match="fit is one of pad, stretch, crop"):
        VlmixImageProcessor(8, "squash")


def test_saved_and_loaded_it_is_the_same(tmp_path) -> None:
    saved = VlmixImageProcessor(48, "crop", (1, 2, 3))
    saved.save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(again) is VlmixImageProcessor
    assert again.to_dict() == saved.to_dict()
    assert (again.image_size, again.fit, again.pad_color) == (48, "crop", [1, 2, 3])
