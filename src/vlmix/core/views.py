"""How a picture is shown to the encoders: whole, or as several views whose tokens are joined again.

An encoder sees every view, or, where its settings say ``sees: picture``, the whole picture once; its map is
then divided among the views (``PictureShares``). Fusion and projector work view by view, so every tiling goes
with every fusion.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
import transformers.initialization as init
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vlmix.core.interfaces import Part, VisionEncoder
from vlmix.core.tensors import FeatureMap, Grid, VisionSpec

if TYPE_CHECKING:
    from PIL import Image

Box = tuple[float, float, float, float]
"""Top, left, bottom and right of a view in fractions of the picture; beyond 0..1 there is padding."""
Cells = tuple[slice, slice]
"""Rows and columns of a grid."""
Size = tuple[int, int]
"""Width and height in pixels, as Pillow has them."""
_WHOLE_CELLS = 1e-6


@dataclass(frozen=True, slots=True)
class Tiling:
    """How one picture is cut: ``rows`` x ``columns`` tiles, and the picture's own size in pixels."""

    rows: int
    columns: int
    height: int
    width: int


class Views(Part):
    """One picture -> views, and the views' tokens -> the picture's tokens.

    Where the number of tokens ``varies`` with the picture's shape, the processor cuts the views from the
    picture itself and tells the model each picture's tiling. Otherwise the model makes the views from the
    canonical picture (``spread``), and every picture has the tiling that ``plan`` gives.
    """

    varies: ClassVar[bool] = False
    newline: nn.Parameter | None

    def __init__(self, settings: Any, spec: VisionSpec, *, ends_rows: bool = False) -> None:
        super().__init__()
        self.settings = settings
        self.register_parameter("newline", nn.Parameter(torch.zeros(spec.channels)) if ends_rows else None)

    def reset(self) -> None:
        """The end of a row starts as a random direction of length one."""
        if self.newline is not None:
            init.normal_(self.newline, std=self.newline.numel() ** -0.5)

    @classmethod
    @abstractmethod
    def plan(cls, settings: Any, spec: VisionSpec) -> Tiling:
        """The tiling with the most tokens, ``spec`` being what the projector gives for one view.

        Raises:
            PlanError: if the tokens of views cannot be joined so, or no tiling keeps to the budget.

        """

    @classmethod
    @abstractmethod
    def tiling(cls, settings: Any, size: Size, side: int, grid: Grid) -> Tiling:
        """How a picture of ``size`` is cut into tiles of ``side`` pixels that give ``grid`` tokens each."""

    @classmethod
    @abstractmethod
    def boxes(cls, settings: Any, tiling: Tiling) -> tuple[Box, ...]:
        """Where each view of a picture lies, in the order in which views are encoded."""

    @classmethod
    @abstractmethod
    def tokens(cls, settings: Any, tiling: Tiling, grid: Grid) -> int:
        """Tokens of one picture."""

    @classmethod
    def share(cls, settings: Any, spec: VisionSpec) -> VisionSpec:
        """What a view gets of the map of an encoder that sees the whole picture.

        Raises:
            PlanError: if the map cannot be divided so.

        """
        return VisionSpec(spec.grid, spec.channels)

    @classmethod
    def shown(cls, settings: Any, tiling: Tiling, grid: Grid) -> Cells | None:
        """The cells of a view's ``grid`` that show the picture, or ``None`` where fusions need not know."""
        return None

    @classmethod
    def cut(cls, settings: Any, image: Image.Image, tiling: Tiling, side: int) -> list[Image.Image]:
        """The views of a picture as squares of ``side`` pixels; for tilings that vary."""
        raise TypeError(f"{cls.__name__} makes its views from the canonical picture")

    @classmethod
    def picture_size(cls, settings: Any) -> int | None:
        """Side of the whole picture that goes along with views cut by the processor, if there is one."""
        return None

    def spread(self, pixel_values: Float[Tensor, "i 3 s s"]) -> Float[Tensor, "v 3 t t"]:
        """The views of every picture, one picture after the other."""
        return pixel_values

    @classmethod
    def order(cls, settings: Any, tiling: Tiling, grid: Grid) -> Int64[Tensor, " n"] | None:
        """Which cell each token of a picture is, counted over its views, or -1 for the end of a row.

        ``None`` stands for all cells in order.
        """
        return None

    def join(self, tokens_VND: Tensor, order_N: Tensor | None) -> Float[Tensor, "n d"]:
        """The tokens of every picture, one picture after the other, ``order_N`` counting over all views."""
        tokens_ND = tokens_VND.flatten(0, 1)
        if order_N is None:
            return tokens_ND
        if self.newline is not None:  # the end of a row is the last one, where -1 points to
            tokens_ND = torch.cat((tokens_ND, self.newline.to(tokens_ND)[None]))
        return tokens_ND[order_N]


class ShownCells:
    """Stands in a fusion for an encoder, and marks which cells of its map show the picture."""

    def __init__(
        self, encoder: VisionEncoder, views: type[Views], settings: Any, tilings: Sequence[Tiling]
    ) -> None:
        self.encoder, self.views, self.settings, self.tilings = encoder, views, settings, tilings

    def __call__(self, pixel_values: Tensor) -> FeatureMap:
        """The encoder's map with its mask."""
        return self._marked(self.encoder(pixel_values))

    def levels(self, pixel_values: Tensor) -> list[FeatureMap]:
        """The encoder's levels, each with its mask."""
        return [self._marked(level) for level in self.encoder.levels(pixel_values)]

    def _marked(self, found: FeatureMap) -> FeatureMap:
        mask_IHW = torch.zeros((len(self.tilings), *found.grid), dtype=torch.bool)
        for mask_HW, tiling in zip(mask_IHW, self.tilings, strict=True):
            cells = self.views.shown(self.settings, tiling, found.grid)
            mask_HW[... if cells is None else cells] = True
        return replace(found, mask=mask_IHW.flatten(1).to(found.tokens.device))


class PictureShares:
    """Stands in a fusion for an encoder that sees the whole picture: runs it once, gives every view its part.

    ``pictures`` are the canonical pictures, ``places`` the picture's number and the box of every view, and
    ``spec`` what a view is promised.
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        pictures: Tensor,
        places: Sequence[tuple[int, Box]],
        spec: VisionSpec,
    ) -> None:
        self.encoder, self.pictures, self.places, self.spec = encoder, pictures, places, spec

    def __call__(self, pixel_values: Tensor) -> FeatureMap:
        """Every view's part of its picture's map."""
        whole = self.encoder(self.pictures)
        parts = [part_of(whole, number, box, self.spec.grid) for number, box in self.places]
        return FeatureMap(torch.cat([part.tokens for part in parts]), self.spec.grid)

    def levels(self, pixel_values: Tensor) -> list[FeatureMap]:
        """One level: the parts are cut from the map as a whole."""
        return [self(pixel_values)]


def part_of(found: FeatureMap, number: int, box: Box, grid: Grid) -> FeatureMap:
    """The part of picture ``number``'s map that lies in ``box``, brought to ``grid``.

    A part that ends between cells is interpolated, and past the picture's edge the outermost cells go on.
    """
    alone = FeatureMap(found.tokens[number : number + 1], found.grid)
    rows, columns = found.grid
    edges = [side * count for side, count in zip(box, (rows, columns, rows, columns), strict=True)]
    near = [round(edge) for edge in edges]
    inside = 0 <= near[0] < near[2] <= rows and 0 <= near[1] < near[3] <= columns
    if inside and all(abs(edge - cell) < _WHOLE_CELLS for edge, cell in zip(edges, near, strict=True)):
        x_1CHW = alone.to_nchw()[:, :, near[0] : near[2], near[1] : near[3]]
        return FeatureMap.from_nchw(x_1CHW).resampled(grid)
    top, left, bottom, right = box
    y_H, x_W = (
        2 * (start + (end - start) * (torch.arange(count, device=found.tokens.device) + 0.5) / count) - 1
        for start, end, count in ((top, bottom, grid[0]), (left, right, grid[1]))
    )
    places_1HW2 = torch.stack((x_W.expand(grid), y_H[:, None].expand(grid)), dim=-1)[None]
    sampled = F.grid_sample(
        alone.to_nchw().float(), places_1HW2.float(), "bilinear", "border", align_corners=False
    )
    return FeatureMap.from_nchw(sampled.to(found.tokens.dtype))
