"""DINOv3 vision transformer: any layer's patch tokens; positions are rotations, so any picture size fits.

The defaults are DINOv3 ViT-L/16 at 512 pixels, read after its last block and final norm.
"""

from __future__ import annotations

import math
from typing import Literal, Self

import torch
from pydantic import NonNegativeInt, PositiveFloat
from torch import Tensor, nn
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from vlmix.core.errors import PlanError
from vlmix.core.interfaces import VisionEncoder
from vlmix.core.parts import ENCODERS
from vlmix.core.tensors import FeatureMap, VisionSpec
from vlmix.encoders._pixels import Colour, encoder_input
from vlmix.encoders._vit import VitSettings, vit_spec
from vlmix.encoders._weights import load_tower

_ROTATED = 4  # channels of a head that share one frequency: two axes, sine and cosine


class Dinov3Settings(VitSettings):
    """Sizes of the tower.

    ``registers`` counts its register tokens, ``gated`` is true of the models with a SwiGLU, ``layer_scale``
    is the initial value of the residual scales, ``final_norm`` applies the published last norm to the
    chosen layer. There is no position table, so ``table_size`` has no meaning here.
    """

    kind: Literal["dinov3"] = "dinov3"  # pyright: ignore[reportIncompatibleVariableOverride]
    image_size: int = 512
    patch_size: int = 16
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp: int = 4096
    registers: NonNegativeInt = 4
    gated: bool = False
    rope_theta: PositiveFloat = 100.0
    layer_scale: float = 1.0
    final_norm: bool = True
    mean: Colour = (0.485, 0.456, 0.406)
    std: Colour = (0.229, 0.224, 0.225)

    @classmethod
    def tiny(cls) -> Self:
        """Three blocks of which two run, two registers, the final norm, and a grid of 4 x 4."""
        return cls(
            image_size=32,
            patch_size=8,
            width=16,
            layers=3,
            heads=2,
            mlp=32,
            registers=2,
            feature_layer=-2,
        )


@ENCODERS.register("dinov3")
class Dinov3Encoder(VisionEncoder):
    """DINOv3's tower up to the chosen layer."""

    settings_class = Dinov3Settings

    def __init__(self, settings: Dinov3Settings) -> None:
        super().__init__(settings)
        self.settings, self.weights = settings, settings.weights
        self.tower = DINOv3ViTModel(
            DINOv3ViTConfig(
                hidden_size=settings.width,
                intermediate_size=settings.mlp,
                num_hidden_layers=self.spec.blocks,
                num_attention_heads=settings.heads,
                image_size=settings.image_size,
                patch_size=settings.patch_size,
                num_register_tokens=settings.registers,
                use_gated_mlp=settings.gated,
                rope_theta=settings.rope_theta,
                layerscale_value=settings.layer_scale,
            )
        )
        # Theirs keeps frequencies in a buffer that is not saved; the rotations are made below instead.
        self.tower.set_submodule("rope_embeddings", nn.Identity())
        if not settings.final_norm:
            self.tower.set_submodule("norm", nn.Identity())

    @classmethod
    def plan(cls, settings: Dinov3Settings) -> VisionSpec:
        """See ``vit_spec``.

        Raises:
            PlanError: also if a head's channels do not divide into rotations, or there is a `table_size`.

        """
        if settings.table_size is not None:
            raise PlanError("dinov3: there is no position table; leave out table_size")
        spec = vit_spec(settings)
        if (settings.width // settings.heads) % _ROTATED:
            raise PlanError(
                f"dinov3: a head of {settings.width // settings.heads} channels does not divide into "
                f"rotations; width / heads must be a multiple of {_ROTATED}"
            )
        return spec

    @property
    def inert_parameters(self) -> tuple[str, ...]:
        """The mask token, which only pre-training uses."""
        return ("tower.embeddings.mask_token",)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Class token, registers and patches: (I, 1 + registers + N, C)."""
        dtype = self.tower.embeddings.patch_embeddings.weight.dtype
        return self.tower.embeddings(encoder_input(pixel_values, self.settings, dtype))

    def block(self, index: int, x: Tensor) -> Tensor:
        """Transformer block ``index``."""
        return self.tower.model.layer[index](x, position_embeddings=self._rotations(x))

    def finish(self, x: Tensor) -> FeatureMap:
        """Patch tokens only, normed where the settings say so."""
        return FeatureMap(self.tower.norm(x)[:, -self.spec.tokens :], self.spec.grid)

    def load_weights(self, source: str) -> None:
        """Load a DINOv3 ViT from a hub id or folder.

        Raises:
            CheckpointError: if sizes differ, or a tensor is missing, left over or of another shape.

        """
        unused = () if self.settings.final_norm else (r"norm\.",)
        load_tower(
            self.tower,
            source,
            layers=self.settings.layers,
            unused=(*unused, r"embeddings\.mask_token$", r"rope_embeddings\."),
        )

    def _rotations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of each patch's angles, (N, D): its centre in -1..1 along rows, then columns."""
        rows, columns = self.spec.grid
        y = (torch.arange(rows, device=x.device, dtype=torch.float32) + 0.5) / rows
        z = (torch.arange(columns, device=x.device, dtype=torch.float32) + 0.5) / columns
        centres_N2 = 2 * torch.stack((y.repeat_interleave(columns), z.repeat(rows)), dim=-1) - 1
        share = torch.arange(0, 1, _ROTATED * self.settings.heads / self.settings.width, device=x.device)
        angles_N2F = 2 * math.pi * centres_N2[:, :, None] * self.settings.rope_theta**-share
        angles_ND = angles_N2F.flatten(1).tile(2)
        return angles_ND.cos().to(x.dtype), angles_ND.sin().to(x.dtype)
