"""Pix2Struct's encoder: patches of a picture that is made as large as the number of patches allows.

The defaults are Pix2Struct-large with 2048 patches: a square picture becomes 45 x 45 tokens. Patches are cut
in torch where the pixels are; the published processor does it on the host. A canonical picture is square, so
no slot is padding.
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

from vlmix.core.errors import PlanError
from vlmix.core.interfaces import VisionEncoder
from vlmix.core.parts import ENCODERS
from vlmix.core.tensors import FeatureMap, VisionSpec
from vlmix.encoders._pixels import Colour, ImageSettings, encoder_input
from vlmix.encoders._weights import load_safetensors

_INSIDE = re.compile(r"^encoder\.(?=embeddings\.|encoder\.|layernorm\.)")  # of the whole model


class Pix2structSettings(ImageSettings):
    """Sizes of the encoder.

    ``patches`` is the most patches there may be; ``positions`` the rows of each position table. Every picture
    is normalised by its own mean and deviation, so ``mean`` and ``std`` keep their values of 0 and 1.
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
        """Patches of the normalised and resized picture, with rows and columns: (I, N, C)."""
        parts, patch, side = self.tower.embeddings, self.settings.patch_size, self.spec.grid[0]
        x_I3SS = 255 * encoder_input(pixel_values, self.settings, torch.float32)
        spread = x_I3SS.std(dim=(1, 2, 3), keepdim=True, correction=0)
        x_I3SS = (x_I3SS - x_I3SS.mean(dim=(1, 2, 3), keepdim=True)) / spread.clamp_min(
            x_I3SS[0].numel() ** -0.5
        )
        x_I3SS = F.interpolate(
            x_I3SS, size=(side * patch, side * patch), mode="bilinear", align_corners=False, antialias=True
        )
        cells = x_I3SS.unflatten(2, (side, patch)).unflatten(4, (side, patch))
        patches_INC = cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        places = torch.arange(1, side + 1, device=x_I3SS.device)
        rows, columns = parts.row_embedder(places), parts.column_embedder(places)
        return (
            parts.patch_projection(patches_INC.to(parts.patch_projection.weight.dtype))
            + rows.repeat_interleave(side, 0)
            + columns.repeat(side, 1)
        )

    def block(self, index: int, x: Tensor) -> Tensor:
        """Transformer block ``index``."""
        return self.tower.encoder.layer[index](x, None)[0]

    def finish(self, x: Tensor) -> FeatureMap:
        """Every token, normed."""
        return FeatureMap(self.tower.layernorm(x), self.spec.grid)

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
