"""Pix2Struct's encoder: patches of a picture that is made as large as the number of patches allows.

The defaults are Pix2Struct-large with 2048 patches (Lee et al., arXiv:2210.03347): a square picture becomes
45 x 45 tokens. A rectangle gets the grid its proportions ask for, and its map is brought to the square's.
Patches are cut in torch where the pixels are; the published processor does it on the host.
"""

from __future__ import annotations

import math
import re
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor
from transformers import Pix2StructVisionConfig, Pix2StructVisionModel

from vlmix.core.errors import ImageError, PlanError
from vlmix.core.interfaces import VisionEncoder
from vlmix.core.parts import ENCODERS
from vlmix.core.tensors import FeatureMap, Grid, VisionSpec
from vlmix.encoders._aspect import cut_patches, on_grid, planned_map
from vlmix.encoders._pixels import Colour, ImageSettings, encoder_input, picture_size
from vlmix.encoders._weights import load_safetensors

_INSIDE = re.compile(r"^encoder\.(?=embeddings\.|encoder\.|layernorm\.)")  # of the whole model


class Pix2structSettings(ImageSettings):
    """Sizes of the encoder.

    ``patches`` is the most patches there may be; ``positions`` the rows of each position table. A square
    picture is brought to ``image_size`` first; a rectangle is taken as it is. Every picture is normalised by
    its own mean and deviation, so ``mean`` and ``std`` keep their values of 0 and 1.
    """

    kind: Literal["pix2struct"] = "pix2struct"  # pyright: ignore[reportIncompatibleVariableOverride]
    image_size: PositiveInt = 1024
    patch_size: PositiveInt = 16
    width: PositiveInt = 1536
    layers: PositiveInt = 18
    heads: PositiveInt = 24
    head_width: PositiveInt = 64
    mlp: PositiveInt = 3968
    patches: PositiveInt = 2048
    positions: PositiveInt = 4096
    mean: Colour = (0.0, 0.0, 0.0)
    std: Colour = (1.0, 1.0, 1.0)

    def shrunk(self, factor: int) -> Self:
        """As every encoder, with patches and positions in proportion to the picture's area."""
        areas = {"patches": self.patches // factor**2 or 1, "positions": self.positions // factor**2 or 2}
        return super().shrunk(factor).changed(**areas)

    @classmethod
    def tiny(cls) -> Self:
        """Two blocks on a grid of 4 x 4, with two patches to spare."""
        return cls(
            image_size=32,
            patch_size=4,
            width=16,
            layers=2,
            heads=2,
            head_width=8,
            mlp=32,
            patches=18,
            positions=18,
        )


@ENCODERS.register("pix2struct")
class Pix2structEncoder(VisionEncoder):
    """All blocks and the final norm."""

    settings_class = Pix2structSettings

    def __init__(self, settings: Pix2structSettings) -> None:
        super().__init__(settings)
        self.settings, self.weights = settings, settings.weights
        self.tower = Pix2StructVisionModel(
            Pix2StructVisionConfig(
                hidden_size=settings.width,
                patch_embed_hidden_size=3 * settings.patch_size**2,
                d_ff=settings.mlp,
                d_kv=settings.head_width,
                num_hidden_layers=settings.layers,
                num_attention_heads=settings.heads,
                seq_len=settings.positions,
                dropout_rate=0.0,
                attention_dropout=0.0,
            )
        )

    @classmethod
    def plan(cls, settings: Pix2structSettings) -> VisionSpec:
        """The largest square grid of at most ``patches`` cells.

        Raises:
            PlanError: if the position tables are too short for it.

        """
        side = math.isqrt(settings.patches)
        if side >= settings.positions:  # places are counted from 1
            raise PlanError(
                f"pix2struct: {settings.positions} positions are too few for {side} rows counted from 1"
            )
        return VisionSpec((side, side), settings.width, blocks=settings.layers, token_blocks=True)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Patches of the normalised and resized picture, with rows and columns.

        (I, N, C) on the planned grid, (I, H, W, C) where a rectangle has another.

        Raises:
            ImageError: if the picture is so long that the position tables end before it.

        """
        parts, patch = self.tower.embeddings, self.settings.patch_size
        given = picture_size(pixel_values)
        square = given[0] == given[1]
        rows, columns = self.spec.grid if square else self._grid(*given)
        x_I3HW = 255 * encoder_input(pixel_values, self.settings, torch.float32, None if square else given)
        spread = x_I3HW.std(dim=(1, 2, 3), keepdim=True, correction=0)
        x_I3HW = (x_I3HW - x_I3HW.mean(dim=(1, 2, 3), keepdim=True)) / spread.clamp_min(
            x_I3HW[0].numel() ** -0.5
        )
        size = (rows * patch, columns * patch)
        x_I3HW = F.interpolate(x_I3HW, size=size, mode="bilinear", align_corners=False, antialias=True)
        patches_INC = cut_patches(x_I3HW, patch).to(parts.patch_projection.weight.dtype)
        x_INC = (
            parts.patch_projection(patches_INC)
            + parts.row_embedder(_places(rows, x_I3HW)).repeat_interleave(columns, 0)
            + parts.column_embedder(_places(columns, x_I3HW)).repeat(rows, 1)
        )
        return on_grid(x_INC, (rows, columns), self.spec.grid)

    def block(self, index: int, x: Tensor) -> Tensor:
        """Transformer block ``index``."""
        return self.tower.encoder.layer[index](x.flatten(1, -2), None)[0].view(x.shape)

    def finish(self, x: Tensor) -> FeatureMap:
        """Every token, normed."""
        return planned_map(self.tower.layernorm(x), self.spec.grid)

    def load_weights(self, source: str) -> None:
        """Load the encoder of a Pix2Struct model from a hub id or folder.

        Raises:
            CheckpointError: if a tensor is missing, left over or of another shape.

        """
        load_safetensors(
            self.tower,
            source,
            files=("model.safetensors",),
            rename=lambda name: _INSIDE.sub("", name),
            unused=(r"decoder\.",),
        )

    def _grid(self, height: int, width: int) -> Grid:
        """Rows and columns of the largest grid that keeps a rectangle's proportions, as published."""
        patch, most = self.settings.patch_size, self.settings.patches
        # In the published order of operations: whole numbers are cut off, so the last bit matters.
        scale = (most * (patch / height) * (patch / width)) ** 0.5
        rows, columns = (max(min(int(scale * side / patch), most), 1) for side in (height, width))
        if max(rows, columns) >= self.settings.positions:
            raise ImageError(
                f"pix2struct: a picture of {height} x {width} takes {rows} x {columns} patches, but there "
                f"are positions for {self.settings.positions - 1}; cut the picture, or lower `patches`"
            )
        return rows, columns


def _places(count: int, like: Tensor) -> Tensor:
    return torch.arange(1, count + 1, device=like.device)  # 0 is the place of padding
