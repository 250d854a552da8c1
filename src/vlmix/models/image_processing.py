"""Pictures -> the canonical square image: 8-bit RGB of one side, from which every encoder makes its own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from vlmix.core.errors import ImageError, PlanError
from vlmix.core.sample import ImageRef
from vlmix.models.configuration import VlmixConfig

Fit = Literal["pad", "stretch", "crop"]
ImageSource = ImageRef | Path | str | bytes | Image.Image
# Padding first, as LLaVA does, makes a square of the longer side; a longer one is reduced before.
_LONGEST_PADDED_SIDE = 6000


class VlmixImageProcessor(BaseImageProcessor):
    """Makes every picture a square of ``image_size`` pixels, resized bicubically in 8 bits.

    ``fit`` says what happens to a picture that is not square: ``pad`` centres it on ``pad_color`` (LLaVA's
    `expand2square`, CLIP's mean colour), ``crop`` keeps the middle, ``stretch`` changes its proportions.

    Raises:
        PlanError: if ``fit`` is unknown or ``image_size`` is not positive.

    """

    model_input_names = ["pixel_values"]  # noqa: RUF012  (transformers reads this name as it is)

    def __init__(
        self,
        image_size: int = 336,
        fit: Fit = "pad",
        pad_color: Sequence[int] = (122, 116, 104),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if fit not in get_args(Fit) or image_size < 1:
            raise PlanError(
                f"fit is one of {', '.join(get_args(Fit))} and image_size positive, "
                f"not {fit!r} and {image_size}."
            )
        self.image_size, self.fit, self.pad_color = image_size, fit, list(pad_color)

    def preprocess(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, images: Any, return_tensors: str | None = "pt", **kwargs: Any
    ) -> BatchFeature:
        """Pixels of one picture or a list of them: ``pixel_values`` (I, 3, S, S), uint8.

        Raises:
            ImageError: if a picture cannot be read, or an option is given that this processor has not.

        """
        if kwargs:
            raise ImageError(f"unknown image options: {', '.join(kwargs)}. Known: return_tensors.")
        sources = images if isinstance(images, list | tuple) else [images]
        pixels = self.pixels([read_image(source) for source in sources])
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def pixels(self, images: Sequence[ImageRef]) -> UInt8[Tensor, "i 3 s s"]:
        """Open the pictures and make each the canonical image; no picture gives an empty tensor."""
        side = self.image_size
        pixels_ISS3 = np.empty((len(images), side, side, 3), dtype=np.uint8)
        for number, image in enumerate(images):
            try:
                pixels_ISS3[number] = np.asarray(self._square(image.open()))
            except ImageError as error:
                if len(images) == 1:
                    raise
                raise ImageError(f"picture {number + 1} of {len(images)}: {error}") from None
        return torch.from_numpy(pixels_ISS3).permute(0, 3, 1, 2).contiguous()

    def _square(self, image: Image.Image) -> Image.Image:
        size = (self.image_size, self.image_size)
        if self.fit == "pad" and image.width != image.height:
            image = _padded(image, (self.pad_color[0], self.pad_color[1], self.pad_color[2]))
        box = _middle(image) if self.fit == "crop" else None
        if image.size == size:
            return image
        return image.resize(size, Image.Resampling.BICUBIC, box=box)


def read_image(source: ImageSource) -> ImageRef:
    """A picture given as a path, encoded bytes or pixels; nothing is opened yet.

    Raises:
        ImageError: if it is a remote address, or no kind of picture.

    """
    if isinstance(source, ImageRef):
        return source
    if isinstance(source, str):
        if "://" in source or source.startswith("data:"):
            raise ImageError(
                f"{source[:80]!r} is not a local path, and vlmix fetches nothing. Download it, "
                "then give its path, its bytes or a PIL image."
            )
        return ImageRef(Path(source))
    if isinstance(source, Path | bytes | Image.Image):
        return ImageRef(source)
    raise ImageError(f"a picture is a path, bytes or a PIL image, not {type(source).__name__}.")


def _padded(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """The picture in the middle of a square, rounded towards the top left (LLaVA, `expand2square`)."""
    longest = max(image.size)
    if longest > _LONGEST_PADDED_SIDE:
        scale = _LONGEST_PADDED_SIDE / longest
        width, height = (max(1, round(side * scale)) for side in image.size)
        image, longest = image.resize((width, height), Image.Resampling.BICUBIC), _LONGEST_PADDED_SIDE
    square = Image.new("RGB", (longest, longest), color)
    square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    return square


def _middle(image: Image.Image) -> tuple[float, float, float, float]:
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return left, top, left + side, top + side


AutoImageProcessor.register(
    VlmixConfig,
    image_processor_classes={"pil": VlmixImageProcessor, "torchvision": VlmixImageProcessor},
    exist_ok=True,
)
