"""DINOv2 vision transformer, with or without registers: any layer's patch tokens.

The defaults are DINOv2 ViT-L/14 at 518 pixels, read after its last block and final norm.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import NonNegativeInt
from torch import Tensor, nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from vlmix.core.errors import PlanError
from vlmix.core.interfaces import VisionEncoder
from vlmix.core.parts import ENCODERS
from vlmix.core.tensors import FeatureMap, VisionSpec
from vlmix.encoders._pixels import Colour, encoder_input
from vlmix.encoders._vit import VitSettings, vit_spec
from vlmix.encoders._weights import load_tower


class Dinov2Settings(VitSettings):
    """Sizes of the tower.

    ``registers`` counts its register tokens, ``swiglu`` is true of the giant, ``layer_scale`` is the initial
    value of the residual scales, ``final_norm`` applies the published last norm to the chosen layer.
    """

    kind: Literal["dinov2"] = "dinov2"  # pyright: ignore[reportIncompatibleVariableOverride]
    image_size: int = 518
    patch_size: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp: int = 4096
    registers: NonNegativeInt = 0
    swiglu: bool = False
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


@ENCODERS.register("dinov2")
class Dinov2Encoder(VisionEncoder):
    """DINOv2's tower up to the chosen layer."""

    settings_class = Dinov2Settings

    def __init__(self, settings: Dinov2Settings) -> None:
        super().__init__(settings)
        self.settings, self.weights = settings, settings.weights
        self.tower = _tower(settings, self.spec.blocks)
        if not settings.final_norm:
            self.tower.set_submodule("layernorm", nn.Identity())

    @classmethod
    def plan(cls, settings: Dinov2Settings) -> VisionSpec:
        """See ``vit_spec``; transformers writes the hidden layer as a whole multiple of the width.

        Raises:
            PlanError: also if ``mlp`` is no multiple of ``width``.

        """
        if settings.mlp % settings.width:
            raise PlanError(f"dinov2: mlp {settings.mlp} is no multiple of width {settings.width}")
        return vit_spec(settings)

    @property
    def inert_parameters(self) -> tuple[str, ...]:
        """The mask token, which only pre-training uses."""
        return ("tower.embeddings.mask_token",) if self.settings.registers else ()

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Class token, registers and patches with positions: (I, 1 + registers + N, C)."""
        dtype = self.tower.embeddings.patch_embeddings.projection.weight.dtype
        return self.tower.embeddings(encoder_input(pixel_values, self.settings, dtype))

    def block(self, index: int, x: Tensor) -> Tensor:
        """Transformer block ``index``."""
        return self.tower.encoder.layer[index](x)

    def finish(self, x: Tensor) -> FeatureMap:
        """Patch tokens only, normed where the settings say so."""
        return FeatureMap(self.tower.layernorm(x)[:, -self.spec.tokens :], self.spec.grid)

    def load_weights(self, source: str) -> None:
        """Load a DINOv2 model from a hub id or folder.

        Raises:
            CheckpointError: if sizes differ, or a tensor is missing, left over or of another shape.

        """
        unused = () if self.settings.final_norm else (r"layernorm\.",)
        load_tower(
            self.tower,
            source,
            layers=self.settings.layers,
            unused=(*unused, r"embeddings\.mask_token$"),
        )


def _tower(settings: Dinov2Settings, blocks: int) -> Dinov2Model | Dinov2WithRegistersModel:
    sizes = {
        "hidden_size": settings.width,
        "mlp_ratio": settings.mlp // settings.width,
        "num_hidden_layers": blocks,
        "num_attention_heads": settings.heads,
        "image_size": settings.table_size or settings.image_size,
        "patch_size": settings.patch_size,
        "use_swiglu_ffn": settings.swiglu,
        "layerscale_value": settings.layer_scale,
    }
    if settings.registers:
        return Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(**sizes, num_register_tokens=settings.registers)
        )
    return Dinov2Model(Dinov2Config(**sizes, use_mask_token=False))
