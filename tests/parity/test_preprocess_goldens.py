"""Pictures as the authors' own code prepares them: LLaVA, Mini-Gemini, Eagle, LLaVA-HR; every pixel equal.

Bicubic resizing in 8 bits is Pillow's in every one of them, so what the processor makes is compared without a
tolerance once it is normalised as theirs; what the model makes of it further is float arithmetic.
"""

from __future__ import annotations

from functools import cache

import PIL
import pytest
import torch
from safetensors.torch import load_file

from tests.parity.published import GOLDENS
from vlmix.core.sample import ImageRef
from vlmix.core.tensors import VisionSpec
from vlmix.encoders._pixels import CLIP_MEAN, CLIP_STD, encoder_input
from vlmix.encoders.clip import ClipSettings
from vlmix.models.image_processing import VlmixImageProcessor
from vlmix.views.hd import Hd, HdSettings

FOLDER = GOLDENS / "preprocess"
pytestmark = [
    pytest.mark.parity,
    pytest.mark.golden,
    pytest.mark.skipif(not FOLDER.is_dir(), reason="the shared golden folders are absent"),
]
NAMES = ("tall", "wide", "square")
ROUNDING = 1e-6  # float32: theirs is resized after normalising, ours before
# From 13 on Pillow resizes a picture that grows one way and shrinks the other in another order: what was cut
# off at black and white in between differs, by up to 8 of 255 levels in the overview of the tall picture.
OVERVIEW = 0.0 if int(PIL.__version__.partition(".")[0]) < 13 else 0.25
FIT = {"pad": "pad", "square": "crop", "normal": "pad"}


@cache
def golden(system):
    return load_file(FOLDER / f"{system}.safetensors")


def opened(processor, *names):
    return processor.open([ImageRef(FOLDER / "images" / f"{name}.png") for name in names]).pixel_values


def normalised(pixels):
    mean, std = (torch.tensor(colour)[:, None, None] for colour in (CLIP_MEAN, CLIP_STD))
    return (pixels.float() / 255 - mean) / std


@pytest.mark.parametrize(
    ("system", "kind", "side"),
    [("llava", kind, side) for kind in ("pad", "square") for side in (42, 56)]
    + [(system, kind, 64) for system in ("eagle", "hr") for kind in ("pad", "square")],
)
def test_squares(system, kind, side, agree):
    found = opened(VlmixImageProcessor(side, FIT[kind]), *NAMES)
    agree("preprocess", f"{system}.{kind}.{side}", normalised(found), golden(system)[f"{kind}.{side}"], 0.0)


@pytest.mark.parametrize("side", [42, 56])
def test_anyres_tiles(side, agree):
    processor = VlmixImageProcessor(side, views={"kind": "anyres"})
    for number, name in enumerate(NAMES):
        found = opened(processor, name)
        expected = golden("llava")[f"anyres.{side}.{number}"]
        agree("preprocess", f"llava.anyres.{side}.{number}", normalised(found), expected, OVERVIEW)


@pytest.mark.parametrize("kind", ["normal", "square"])
@pytest.mark.parametrize("number", range(3))
def test_mini_gemini_makes_the_small_picture_from_the_large_one(kind, number, agree):
    theirs = golden("mgm")
    large = opened(VlmixImageProcessor(64, FIT[kind]), NAMES[number])
    key = f"train.{kind}.{number}.image_aux"
    agree("preprocess", f"mgm.{key}", normalised(large)[0], theirs[key], 0.0)
    clip = ClipSettings(image_size=56, patch_size=14, resize="bilinear")
    small = encoder_input(large, clip, torch.float32)[0]
    keys = {"normal": ("train", "infer"), "square": ("train",)}[kind]
    for key in keys:
        expected = theirs[f"{key}.{kind}.{number}.image"].view_as(small)
        agree("preprocess", f"mgm.{key}.{kind}.{number}", small, expected, ROUNDING)


@pytest.mark.parametrize("overview", [True, False])
@pytest.mark.parametrize("number", range(3))
def test_mini_gemini_hd_tiles(overview, number, agree):
    theirs = golden("mgm")
    large = opened(VlmixImageProcessor(128), NAMES[number])
    key = f"train.hd.{number}.image_aux"
    agree("preprocess", f"mgm.{key}", normalised(large)[0], theirs[key], 0.0)
    settings = HdSettings(tile_size=56, overview=overview)
    views = Hd(settings, VisionSpec((4, 4), 8)).spread(large)
    clip = ClipSettings(image_size=56, patch_size=14)
    found = encoder_input(views, clip, torch.float32)
    keys = ("train.hd", "infer.hd") if overview else ("train.hd_noglobal",)
    for key in keys:
        expected = theirs[f"{key}.{number}.image"].view_as(found)
        if overview:  # they put the overview last
            expected = expected.roll(1, dims=0)
        agree("preprocess", f"mgm.{key}.{number}", found, expected, ROUNDING)


def test_text_alone_has_no_picture_where_theirs_had_an_empty_one():
    """Their loaders give a row of text a picture of zeros, which both encoders run on; ours has none."""
    shape = golden("mgm")["train.normal.text_only.image_aux_shape"]
    assert shape.tolist() == [3, 64, 64]
    assert opened(VlmixImageProcessor(64)).shape == (0, 3, 64, 64)
