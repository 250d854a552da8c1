"""Between pictures and views: tilings as tensors, and encoders that see the whole picture."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Int64
from torch import Tensor

from vlmix.core.errors import ImageCountError
from vlmix.core.interfaces import VisionEncoder
from vlmix.core.parts import VIEWS
from vlmix.core.tensors import FeatureMap
from vlmix.core.views import PictureShares, ShownCells, Tiling
from vlmix.models.configuration import VisionPlan, VlmixConfig


def tilings_tensor(tilings: Sequence[Tiling]) -> Int64[Tensor, "i 4"]:
    """Rows, columns, height and width of every picture."""
    rows = [(each.rows, each.columns, each.height, each.width) for each in tilings]
    return torch.tensor(rows, dtype=torch.int64).view(-1, 4)


@dataclass(frozen=True)
class Sight:
    """What a model saw: the fused map of every view, and the tokens (N, D) of all pictures in order.

    ``order`` (N,) says which cells these are, as ``Viewing.order``.
    """

    fused: FeatureMap
    tokens: Tensor
    order: Tensor | None


class Viewing:
    """How a model's pictures are shown: its views' settings, and which encoders see the whole picture."""

    def __init__(self, config: VlmixConfig, plan: VisionPlan) -> None:
        self.plan = plan
        self.settings = config.view_settings()
        self.views = VIEWS.get(self.settings.kind)
        self.scopes = [settings.sees for settings in config.encoder_settings()]

    def tilings(self, pixel_values: Tensor, image_tilings: Tensor | None) -> list[Tiling]:
        """The tiling of every picture.

        Raises:
            ImageCountError: if pixels and tilings belong to different pictures.

        """
        if not self.plan.varies:
            return [self.plan.tiling] * pixel_values.shape[0]
        if image_tilings is None:
            raise ImageCountError(
                f"views `{self.settings.kind}` need image_tilings. Pass pictures through the VlmixProcessor"
            )
        tilings = [Tiling(*row) for row in image_tilings.tolist()]
        expected = sum(self.count(tiling) for tiling in tilings)
        if expected != pixel_values.shape[0]:
            raise ImageCountError(
                f"{len(tilings)} pictures are cut into {expected} views, but there are pixels of "
                f"{pixel_values.shape[0]}. Pass pictures through the VlmixProcessor"
            )
        return tilings

    def count(self, tiling: Tiling) -> int:
        """Views of one picture."""
        return len(self.views.boxes(self.settings, tiling))

    def counts(self, tilings: Sequence[Tiling]) -> list[int]:
        """Views of every picture."""
        return [self.count(tiling) for tiling in tilings]

    def tokens(self, tilings: Sequence[Tiling]) -> list[int]:
        """Visual tokens of every picture."""
        grid = self.plan.projected.grid
        return [self.views.tokens(self.settings, tiling, grid) for tiling in tilings]

    def order(self, tilings: Sequence[Tiling], device: torch.device) -> Tensor | None:
        """Which cell of all views each visual token is, -1 for a row's end; ``None`` for all in order."""
        grid = self.plan.projected.grid
        parts: list[Tensor] = []
        first = 0
        for tiling in tilings:
            numbers_N = self.views.order(self.settings, tiling, grid)
            if numbers_N is None:
                return None
            parts.append(torch.where(numbers_N < 0, numbers_N, numbers_N + first))
            first += self.count(tiling) * grid[0] * grid[1]
        return torch.cat(parts).to(device)

    def scoped(
        self,
        encoders: Iterable[VisionEncoder],
        pictures: Tensor | None,
        tilings: Sequence[Tiling],
        *,
        masked: bool = False,
    ) -> list[VisionEncoder]:
        """The encoders as the fusion is to see them: those of the whole picture give each view its part.

        ``masked`` marks the cells that are padding, for fusions that ask.

        Raises:
            ImageCountError: if whole pictures are needed and absent.

        """
        masked = masked and self.views.shown(self.settings, self.plan.tiling, (1, 1)) is not None
        if "picture" not in self.scopes:
            return [self._marked(encoder, tilings) for encoder in encoders] if masked else list(encoders)
        if pictures is None:
            raise ImageCountError("an encoder sees whole pictures, but picture_values are missing")
        places = [
            (number, box)
            for number, tiling in enumerate(tilings)
            for box in self.views.boxes(self.settings, tiling)
        ]
        return [
            cast("VisionEncoder", PictureShares(encoder, pictures, places, spec))
            if scope == "picture"
            else encoder
            for encoder, scope, spec in zip(encoders, self.scopes, self.plan.offered, strict=True)
        ]

    def _marked(self, encoder: VisionEncoder, tilings: Sequence[Tiling]) -> VisionEncoder:
        return cast("VisionEncoder", ShownCells(encoder, self.views, self.settings, tilings))


def pictures_of_rows(placeholders: Sequence[int], tokens: Sequence[int]) -> list[int]:
    """How many pictures each row of a batch shows, from its placeholders and every picture's tokens."""
    counts: list[int] = []
    first = 0
    for wanted in placeholders:
        last, found = first, 0
        while last < len(tokens) and found < wanted:
            found += tokens[last]
            last += 1
        counts.append(last - first)
        first = last
    return counts
