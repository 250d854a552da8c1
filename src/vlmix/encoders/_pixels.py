"""The canonical picture -> what one encoder reads: resize, normalise, cast; shared by all encoders."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import PositiveInt, model_validator
from torch import Tensor

from vlmix.core.errors import ImageError
from vlmix.core.resampling import EncoderSettings

Colour = tuple[float, float, float]
Resize = Literal["bilinear_antialias", "bicubic_antialias", "bilinear", "bilinear_corners"]

CLIP_MEAN: Colour = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Colour = (0.26862954, 0.26130258, 0.27577711)

_INTERPOLATION: dict[str, dict[str, Any]] = {
    "bilinear_antialias": {"mode": "bilinear", "antialias": True, "align_corners": False},
    "bicubic_antialias": {"mode": "bicubic", "antialias": True, "align_corners": False},
    "bilinear": {"mode": "bilinear", "align_corners": False},
    "bilinear_corners": {"mode": "bilinear", "align_corners": True},
}


class ImageSettings(EncoderSettings):
    """What every encoder says about its pictures.

    ``image_size`` is the side in pixels, ``resize`` how the canonical picture gets there (``bilinear``
    without antialias is Mini-Gemini's, ``bilinear_corners`` Eagle's and LLaVA-HR's), ``mean`` and ``std``
    normalise red, green and blue, ``weights`` names the published weights: a hub id or a folder. ``resample``
    brings the finished map to another grid.
    """

    lengths: ClassVar[tuple[str, ...]] = ("image_size",)
    kept: ClassVar[tuple[str, ...]] = ("patch_size",)  # so that the grid shrinks as the picture does
    image_size: PositiveInt
    resize: Resize = "bilinear_antialias"
    mean: Colour = CLIP_MEAN
    std: Colour = CLIP_STD
    weights: str | None = None

    @model_validator(mode="after")
    def _std_divides(self) -> Self:
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0 for every colour, it is {self.std}")
        return self


def picture_size(pixel_values: Tensor) -> tuple[int, int]:
    """Rows and columns of canonical pictures.

    Raises:
        ImageError: if the tensor is no batch of three-colour pictures, float or uint8.

    """
    if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
        raise ImageError(
            f"pixel_values must be (images, 3, rows, columns), they are {tuple(pixel_values.shape)}"
        )
    if pixel_values.dtype != torch.uint8 and not pixel_values.is_floating_point():
        raise ImageError(
            f"pixel_values must be uint8 in 0..255 or floating point in 0..1, not {pixel_values.dtype}"
        )
    return pixel_values.shape[2], pixel_values.shape[3]


def encoder_input(
    pixel_values: Tensor,
    settings: ImageSettings,
    dtype: torch.dtype,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Bring canonical pictures (I, 3, H, W), float in 0..1 or uint8, to (I, 3, image_size, image_size).

    ``size`` (rows, columns) takes the place of that square. Works in float32 and casts to ``dtype`` at the
    end; never clamps, so values outside 0..1 pass through.

    Raises:
        ImageError: if the tensor is no batch of three-colour pictures in one of the two forms.

    """
    given, size = picture_size(pixel_values), size or (settings.image_size, settings.image_size)
    x_I3SS = pixel_values.to(torch.float32)
    if pixel_values.dtype == torch.uint8:
        x_I3SS = x_I3SS / 255
    if given != size:
        x_I3SS = F.interpolate(x_I3SS, size=size, **_INTERPOLATION[settings.resize])
    # Made here, not kept as buffers: unsaved buffers come out as garbage when a model is loaded.
    mean_311, std_311 = (x_I3SS.new_tensor(colour)[:, None, None] for colour in (settings.mean, settings.std))
    return ((x_I3SS - mean_311) / std_311).to(dtype)
