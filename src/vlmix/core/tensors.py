"""Feature maps that remember their grid, and what a part promises before any weight exists.

Shape letters used in the whole project: B rows of a batch, I images, N visual tokens, T text tokens,
C channels, D model width, H W grid rows and columns, S image side, M keys of one window, E experts,
K experts chosen for one token, R rows that experts work on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlmix.core.errors import PlanError

Grid = tuple[int, int]
Resampling = Literal["bilinear", "bilinear_corners", "area"]
# Let a and b be a token's row and column among the neighbours it is joined with and c its channel. The first
# counts (a, b, c): InternVL, Idefics3, SmolVLM, Llama 4. The second counts (c, a, b): torch's
# ``pixel_unshuffle``, as Eagle applies it to SAM, and ``unfold`` as in Mistral 3.
Joining = Literal["token_major", "channel_major"]


@dataclass(frozen=True, slots=True)
class VisionSpec:
    """What an encoder, fusion or projector will give for one image: grid (rows, columns) and channels.

    ``blocks`` is the number of steps a fusion inside the backbone may run one by one. With ``token_blocks``
    each of them takes and gives (I, prefix + N, C), the patch tokens last, so that a fusion may change them.
    A strip of tokens without a rectangle has the grid ``(1, n)``. ``levels`` are the scales the map is made
    of, if it is: all brought to ``grid`` (bilinear, edges aligned) and stacked on channels in this order they
    are the map. Empty: the map itself is the only level.
    """

    grid: Grid
    channels: int
    blocks: int = 1
    token_blocks: bool = False
    levels: tuple[VisionSpec, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens per image."""
        return math.prod(self.grid)


@dataclass(frozen=True, slots=True)
class FeatureMap:
    """Visual tokens in row-major order with the grid they fill.

    ``mask`` is true of the cells that show the picture, where a fusion reads it; ``memory`` is what a fusion
    keeps for its ``refine`` inside the decoder. Neither survives resampling.

    Raises:
        ValueError: if the tokens do not fill the grid.

    """

    tokens: Float[Tensor, "i n c"]
    grid: Grid
    mask: Bool[Tensor, "i n"] | None = None
    memory: Any = None

    def __post_init__(self) -> None:
        if self.tokens.ndim != 3 or self.tokens.shape[1] != math.prod(self.grid):
            raise ValueError(f"{tuple(self.tokens.shape)} tokens do not fill a grid of {self.grid}")

    @staticmethod
    def from_nchw(x_ICHW: Float[Tensor, "i c h w"]) -> FeatureMap:
        """Read a map laid out as channels, rows, columns."""
        return FeatureMap(x_ICHW.flatten(2).transpose(1, 2), (x_ICHW.shape[-2], x_ICHW.shape[-1]))

    def to_nchw(self) -> Float[Tensor, "i c h w"]:
        """Lay the tokens out as channels, rows, columns: a view, whose memory stays in the tokens' order."""
        i, _, c = self.tokens.shape
        return self.tokens.view(i, *self.grid, c).permute(0, 3, 1, 2)

    def resampled(self, grid: Grid, mode: Resampling = "bilinear") -> FeatureMap:
        """Bring the map to another grid, in float32; the same grid returns the map itself.

        ``bilinear_corners`` aligns the corner samples (Eagle, LLaVA-HR); ``bilinear`` aligns the edges.
        """
        if grid == self.grid:
            return self
        x = self.to_nchw().float()
        if mode == "area":
            x = F.interpolate(x, size=grid, mode="area")
        else:
            x = F.interpolate(x, size=grid, mode="bilinear", align_corners=mode == "bilinear_corners")
        return FeatureMap.from_nchw(x.to(self.tokens.dtype))

    def joined(self, grid: Grid, layout: Joining) -> FeatureMap:
        """Bring the map to a smaller grid by stacking the channels of the tokens each cell covers.

        Raises:
            ValueError: if a cell would cover no whole number of tokens.

        """
        if any(ours % theirs for ours, theirs in zip(self.grid, grid, strict=True)):
            raise ValueError(f"a grid of {self.grid} does not divide into {grid}")
        (i, _, c), (rows, columns) = self.tokens.shape, grid
        down, across = self.grid[0] // rows, self.grid[1] // columns
        x_IHAWBC = self.tokens.reshape(i, rows, down, columns, across, c)
        order = (0, 1, 3, 2, 4, 5) if layout == "token_major" else (0, 1, 3, 5, 2, 4)
        return FeatureMap(x_IHAWBC.permute(order).flatten(3).flatten(1, 2), grid)

    def windows(self, window: Grid) -> Float[Tensor, "i n m c"]:
        """The tokens by window of (rows, columns) cells, windows and cells in row-major order.

        Raises:
            ValueError: if the grid is no whole number of windows.

        """
        if any(side % part for side, part in zip(self.grid, window, strict=True)):
            raise ValueError(f"a grid of {self.grid} is no whole number of windows of {window}")
        i, _, c = self.tokens.shape
        down, across = self.grid[0] // window[0], self.grid[1] // window[1]
        x = self.tokens.reshape(i, down, window[0], across, window[1], c)
        return x.transpose(2, 3).reshape(i, down * across, window[0] * window[1], c)


@dataclass(frozen=True, slots=True)
class TextContext:
    """The instruction, one row for each image, for fusions that look at it: one token, the mean of all."""

    embeddings: Float[Tensor, "b t d"]
    mask: Bool[Tensor, "b t"]


@dataclass(frozen=True, slots=True)
class Mixing:
    """Slots that are mixtures of a batch row's tokens: what goes into each, and what comes back out of it.

    No slot mixes rows of the batch; the experts' rows are the slots of all of them, one row after the other.
    """

    dispatch: Float[Tensor, "b s t"]
    combine: Float[Tensor, "b t s"]


@dataclass(frozen=True, slots=True)
class Routing:
    """One router's decision for one layer and batch: which experts, how much, and the scores behind it.

    The experts work on R rows. Usually row r is token r; else ``rows`` names the token each of them reads and
    adds to, or ``mixing`` makes them slots. ``indices`` holds each row's experts in order of choice,
    ``weights`` their shares; ``kept`` is false of choices that were dropped, whose weight is 0. ``shape`` is
    (rows of the batch, decisions in each): one decision a token, or one a row with ``scope: instance``.
    ``probabilities`` are what balance losses average. ``norms`` say how large what each choice adds is.
    """

    shape: tuple[int, int]
    logits: Float[Tensor, "t e"]
    probabilities: Float[Tensor, "t e"]
    indices: Int[Tensor, "r k"]
    weights: Float[Tensor, "r k"]
    kept: Bool[Tensor, "r k"] | None = None
    rows: Int[Tensor, " r"] | None = None
    mixing: Mixing | None = None
    norms: Float[Tensor, "r k"] | None = None
    layer: str = ""

    @property
    def experts(self) -> int:
        """Number of experts to choose from."""
        return self.logits.shape[-1]


def whole_ratio(larger: Grid, smaller: Grid, what: str) -> Grid:
    """How many times ``smaller`` goes into ``larger`` along rows and columns.

    Raises:
        PlanError: if either ratio is not a whole number of at least 1.

    """
    if any(a % b or a < b for a, b in zip(larger, smaller, strict=True)):
        raise PlanError(f"{what}: a grid of {larger} does not divide into {smaller} whole windows")
    return larger[0] // smaller[0], larger[1] // smaller[1]
