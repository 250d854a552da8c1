"""The canonical picture as the only view."""

from __future__ import annotations

from typing import Literal, Self

from vlmix.core.parts import VIEWS
from vlmix.core.settings import PartSettings
from vlmix.core.tensors import Grid, VisionSpec
from vlmix.core.views import Box, Size, Tiling, Views


class WholeSettings(PartSettings):
    """Nothing to set."""

    kind: Literal["whole"] = "whole"  # pyright: ignore[reportIncompatibleVariableOverride]

    @classmethod
    def tiny(cls) -> Self:
        """As every other."""
        return cls()


@VIEWS.register("whole")
class Whole(Views):
    """As many tokens as one view has."""

    settings_class = WholeSettings

    @classmethod
    def plan(cls, settings: WholeSettings, spec: VisionSpec) -> Tiling:
        """One tile."""
        return Tiling(1, 1, 1, 1)

    @classmethod
    def tiling(cls, settings: WholeSettings, size: Size, side: int, grid: Grid) -> Tiling:
        """One tile."""
        return Tiling(1, 1, size[1], size[0])

    @classmethod
    def boxes(cls, settings: WholeSettings, tiling: Tiling) -> tuple[Box, ...]:
        """The picture."""
        return ((0.0, 0.0, 1.0, 1.0),)

    @classmethod
    def tokens(cls, settings: WholeSettings, tiling: Tiling, grid: Grid) -> int:
        """One view's."""
        return grid[0] * grid[1]
