"""Settings and arithmetic that the vision transformers share."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor

from vlmix.core.errors import PlanError
from vlmix.core.tensors import FeatureMap, Grid, VisionSpec
from vlmix.encoders._pixels import ImageSettings

SHRUNK_LAYERS = 4


class VitSettings(ImageSettings):
    """Sizes of a vision transformer.

    ``layers`` counts the published model's blocks. ``feature_layer`` says which state is read, as in
    ``hidden_states``: 1 is after the first block, -1 after the last, -2 after the one before. Blocks behind
    it are not made. ``table_size`` is the side of the pictures the position table was made for, where that is
    another than ``image_size``: the table keeps its size and is resampled on the way in.
    """

    lengths: ClassVar[tuple[str, ...]] = ()  # its own are rounded to whole patches
    patch_size: PositiveInt
    width: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    mlp: PositiveInt
    feature_layer: int = -1
    table_size: PositiveInt | None = None

    def shrunk(self, factor: int) -> Self:
        """Four blocks, for fusions that stand between them; behind the one that is read, as before."""
        patch, layers = self.patch_size, min(self.layers, SHRUNK_LAYERS)
        behind = min(self.layers - vit_blocks(self), layers - 1)
        sides = {"image_size": self.image_size, "table_size": self.table_size}
        found = {key: max(round(side / patch / factor), 1) * patch for key, side in sides.items() if side}
        return super().shrunk(factor).changed(layers=layers, feature_layer=-1 - behind, **found)


def fewer_blocks(chosen: tuple[int, ...], layers: int) -> tuple[int, ...]:
    """Those of the chosen blocks, counted from 0, that ``layers`` layers have; the last one if none."""
    return tuple(block for block in chosen if block < layers) or ((layers - 1,) if chosen else ())


def table_side(settings: VitSettings) -> int:
    """Rows and columns of the stored position table."""
    return (settings.table_size or settings.image_size) // settings.patch_size


def resampled_table(
    table_NC: Float[Tensor, "n c"],
    side: int,
    grid: Grid,
    *,
    mode: Literal["bicubic", "bilinear"] = "bicubic",
    antialias: bool = True,
) -> Float[Tensor, "m c"]:
    """A square position table of ``side`` brought to another grid, in float32.

    The same grid returns the table itself.
    """
    if grid == (side, side):
        return table_NC
    x_1CHW = FeatureMap(table_NC[None].float(), (side, side)).to_nchw()
    x_1CHW = x_1CHW.contiguous()  # torch 2.15 mixes channels up where they lie innermost and width is 1
    x_1CHW = F.interpolate(x_1CHW, size=grid, mode=mode, align_corners=False, antialias=antialias)
    return FeatureMap.from_nchw(x_1CHW).tokens[0].to(table_NC.dtype)


def vit_blocks(settings: VitSettings) -> int:
    """How many blocks have to run for the chosen feature layer.

    Raises:
        PlanError: if there is no such layer.

    """
    layer, layers = settings.feature_layer, settings.layers
    blocks = layer if layer >= 0 else layers + 1 + layer
    if not 1 <= blocks <= layers:
        raise PlanError(
            f"{settings.kind}: feature_layer {layer} does not exist in {layers} layers; "
            f"it must be 1 to {layers}, or -1 to -{layers}"
        )
    return blocks


def vit_spec(settings: VitSettings) -> VisionSpec:
    """Grid, channels and blocks of a vision transformer without its prefix tokens.

    Raises:
        PlanError: if the picture is no whole number of patches, the heads do not share the width, or the
            feature layer does not exist.

    """
    for name, size in (("image_size", settings.image_size), ("table_size", settings.table_size)):
        if size is not None and size % settings.patch_size:
            whole = size // settings.patch_size
            near = " and ".join(str(n * settings.patch_size) for n in (whole, whole + 1) if n)
            raise PlanError(
                f"{settings.kind}: {name} {size} is no multiple of patch_size {settings.patch_size}; "
                f"take {near}"
            )
    if settings.width % settings.heads:
        raise PlanError(f"{settings.kind}: width {settings.width} is no multiple of heads {settings.heads}")
    side = settings.image_size // settings.patch_size
    return VisionSpec((side, side), settings.width, blocks=vit_blocks(settings), token_blocks=True)
