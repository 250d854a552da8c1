"""Pictures -> the canonical square image: 8-bit RGB of one side, from which every encoder makes its own."""

from collections.abc import Iterator, Sequence
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
from vlmix.core.parts import VIEWS, read_part
from vlmix.core.sample import ImageRef
from vlmix.core.settings import PartSettings
from vlmix.core.squares import cropped, padded
from vlmix.core.views import Tiling, Views
from vlmix.models.batching import Opened
from vlmix.models.configuration import VlmixConfig
from vlmix.models.viewing import tilings_tensor

Fit = Literal["pad", "stretch", "crop"]
ImageSource = ImageRef | Path | str | bytes | Image.Image


class VlmixImageProcessor(BaseImageProcessor):
    """Makes every picture a square of ``image_size`` pixels, resized bicubically in 8 bits.

    ``fit`` says what happens to a picture that is not square: ``pad`` centres it on ``pad_color`` (LLaVA's
    `expand2square`, CLIP's mean colour), ``crop`` keeps the middle, ``stretch`` changes its proportions.

    ``views`` are the settings of a tiling that follows each picture's shape (``anyres``, ``dynamic``), and
    ``view_grid`` the grid of one view's tokens: pictures are then cut into tiles of ``image_size`` instead.

    Raises:
        PlanError: if ``fit`` is unknown or ``image_size`` is not positive.
        RecipeError: if the views' settings are wrong.

    """

    model_input_names = ["pixel_values"]  # noqa: RUF012  (transformers reads this name as it is)

    def __init__(
        self,
        image_size: int = 336,
        fit: Fit = "pad",
        pad_color: Sequence[int] = (122, 116, 104),
        views: dict[str, Any] | None = None,
        view_grid: Sequence[int] = (1, 1),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if fit not in get_args(Fit) or image_size < 1:
            raise PlanError(
                f"fit is one of {', '.join(get_args(Fit))} and image_size positive, "
                f"not {fit!r} and {image_size}."
            )
        self.image_size, self.fit, self.pad_color = image_size, fit, list(pad_color)
        self.views, self.view_grid = views, list(view_grid)

    @staticmethod
    def of(config: VlmixConfig, fit: Fit = "pad") -> "VlmixImageProcessor":
        """The processor that makes what a model of this ``config`` takes."""
        plan = config.plan()
        cut = {"views": config.views, "view_grid": plan.projected.grid} if plan.varies else {}
        return VlmixImageProcessor(config.image_size, fit, **cut)

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
        opened = self.open([read_image(source) for source in sources])
        return BatchFeature(opened.named(), tensor_type=return_tensors)

    def open(self, images: Sequence[ImageRef]) -> Opened:
        """Open the pictures and make each what the model takes; no picture gives an empty tensor.

        Raises:
            ImageError: if a picture cannot be read; names it.

        """
        if self.views is None:
            squares = [self._square(image) for image in _open_each(images)]
            return Opened(_stacked(squares, self.image_size))
        cut, settings = self._cut
        views: list[Image.Image] = []
        wholes: list[Image.Image] = []
        tilings: list[Tiling] = []
        side, picture_size = self.image_size, cut.picture_size(settings)
        for image in _open_each(images):
            tilings.append(self.tiling(image.size))
            views += cut.cut(settings, image, tilings[-1], side)
            if picture_size is not None:
                wholes.append(image.resize((picture_size, picture_size), Image.Resampling.BICUBIC))
        return Opened(
            _stacked(views, side),
            tilings_tensor(tilings),
            None if picture_size is None else _stacked(wholes, picture_size),
        )

    def tiling(self, size: tuple[int, int]) -> Tiling:
        """How a picture of this width and height is cut, where pictures are cut."""
        cut, settings = self._cut
        return cut.tiling(settings, size, self.image_size, self._grid)

    def tokens(self, size: tuple[int, int]) -> int:
        """Visual tokens of a picture of this width and height, where pictures are cut."""
        cut, settings = self._cut
        return cut.tokens(settings, self.tiling(size), self._grid)

    def count(self, size: tuple[int, int]) -> int:
        """Views of a picture of this width and height, where pictures are cut."""
        cut, settings = self._cut
        return len(cut.boxes(settings, self.tiling(size)))

    @property
    def _grid(self) -> tuple[int, int]:
        return self.view_grid[0], self.view_grid[1]

    @property
    def _cut(self) -> tuple[type[Views], PartSettings]:
        settings = read_part(VIEWS, self.views or {}, "views")
        return VIEWS.get(settings.kind), settings

    def _square(self, image: Image.Image) -> Image.Image:
        size = (self.image_size, self.image_size)
        if self.fit == "pad" and image.width != image.height:
            image = padded(image, (self.pad_color[0], self.pad_color[1], self.pad_color[2]))
        if self.fit == "crop":
            return cropped(image, self.image_size)
        if image.size == size:
            return image
        return image.resize(size, Image.Resampling.BICUBIC)


def _open_each(images: Sequence[ImageRef]) -> Iterator[Image.Image]:
    for number, image in enumerate(images):
        try:
            opened = image.open()
        except ImageError as error:
            if len(images) == 1:
                raise
            raise ImageError(f"picture {number + 1} of {len(images)}: {error}") from None
        yield opened


def _stacked(images: Sequence[Image.Image], side: int) -> UInt8[Tensor, "i 3 s s"]:
    pixels_ISS3 = np.empty((len(images), side, side, 3), dtype=np.uint8)
    for number, image in enumerate(images):
        pixels_ISS3[number] = np.asarray(image)
    return torch.from_numpy(pixels_ISS3).permute(0, 3, 1, 2).contiguous()


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


AutoImageProcessor.register(
    VlmixConfig,
    image_processor_classes={"pil": VlmixImageProcessor, "torchvision": VlmixImageProcessor},
    exist_ok=True,
)
