"""SAM's image encoder: windowed attention with a few global blocks, and a neck by choice.

The defaults are SAM ViT-L at 1024 pixels with its published neck: 64 x 64 tokens of 256 channels.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn
from transformers import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionEncoder

from vlmix.core.errors import PlanError
from vlmix.core.interfaces import VisionEncoder
from vlmix.core.parts import ENCODERS
from vlmix.core.tensors import FeatureMap, VisionSpec
from vlmix.encoders._pixels import Colour, encoder_input
from vlmix.encoders._vit import VitSettings, fewer_blocks, vit_spec
from vlmix.encoders._weights import load_safetensors


class SamSettings(VitSettings):
    """Sizes of the encoder.

    ``window`` cells on a side attend among themselves, except in the blocks of ``global_blocks``. ``neck`` is
    ``published`` (two convolutions and norms), ``first`` (only the first convolution and norm: Eagle's) or
    ``none`` (the tower's own channels); ``neck_channels`` come out of it.
    """

    kind: Literal["sam"] = "sam"  # pyright: ignore[reportIncompatibleVariableOverride]
    image_size: int = 1024
    patch_size: int = 16
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp: int = 4096
    window: NonNegativeInt = 14
    global_blocks: tuple[NonNegativeInt, ...] = (5, 11, 17, 23)
    neck: Literal["published", "first", "none"] = "published"
    neck_channels: PositiveInt = 256
    mean: Colour = (0.485, 0.456, 0.406)
    std: Colour = (0.229, 0.224, 0.225)

    def shrunk(self, factor: int) -> Self:
        """As every vision transformer, with windows and global blocks that suit; windows need not divide."""
        small = super().shrunk(factor)
        window = max(self.window // factor, 2) if self.window else 0
        return small.changed(window=window, global_blocks=fewer_blocks(self.global_blocks, small.layers))

    @classmethod
    def tiny(cls) -> Self:
        """Two blocks, one with windows that do not divide the grid of 4 x 4, and the whole neck."""
        return cls(
            image_size=32,
            patch_size=8,
            width=16,
            layers=2,
            heads=2,
            mlp=32,
            window=3,
            global_blocks=(1,),
            neck_channels=12,
        )


@ENCODERS.register("sam")
class SamEncoder(VisionEncoder):
    """SAM's encoder up to the chosen layer."""

    settings_class = SamSettings

    def __init__(self, settings: SamSettings) -> None:
        super().__init__(settings)
        self.settings, self.weights = settings, settings.weights
        self.tower = SamVisionEncoder(
            SamVisionConfig(
                hidden_size=settings.width,
                mlp_dim=settings.mlp,
                num_hidden_layers=self.spec.blocks,
                num_attention_heads=settings.heads,
                image_size=settings.image_size,
                patch_size=settings.patch_size,
                window_size=settings.window,
                global_attn_indexes=list(settings.global_blocks),
                output_channels=settings.neck_channels,
                initializer_range=0.02,
            )
        )
        self.tower.set_submodule("neck", _neck(self.tower.neck, settings.neck))

    @classmethod
    def plan(cls, settings: SamSettings) -> VisionSpec:
        """See ``vit_spec``; the neck decides the channels.

        Raises:
            PlanError: also if a position table is to be resampled, which relative positions do not allow.

        """
        if settings.table_size is not None:
            raise PlanError("sam: positions are relative and sized for image_size; leave out table_size")
        spec = vit_spec(settings)
        channels = settings.width if settings.neck == "none" else settings.neck_channels
        return VisionSpec(spec.grid, channels, blocks=spec.blocks)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Patches with positions: (I, H, W, C)."""
        dtype = self.tower.patch_embed.projection.weight.dtype
        x_IHWC = self.tower.patch_embed(encoder_input(pixel_values, self.settings, dtype))
        return x_IHWC + self.tower.pos_embed

    def block(self, index: int, x: Tensor) -> Tensor:
        """Transformer block ``index``: (I, H, W, C)."""
        return self.tower.layers[index](x)

    def finish(self, x: Tensor) -> FeatureMap:
        """The neck's map."""
        return FeatureMap.from_nchw(self.tower.neck(x))

    def load_weights(self, source: str) -> None:
        """Load a SAM model's image encoder from a hub id or folder.

        Raises:
            CheckpointError: if a tensor is missing, left over or of another shape.

        """
        behind = "|".join(str(layer) for layer in range(self.spec.blocks, self.settings.layers)) or "none"
        dropped = {"published": "none", "first": r"conv2|layer_norm2", "none": r"\w+"}[self.settings.neck]
        load_safetensors(
            self.tower,
            source,
            files=("model.safetensors",),
            rename=lambda name: name.removeprefix("vision_encoder."),
            unused=(
                r"(prompt_encoder|mask_decoder|shared_image_embedding)\.",
                rf"layers\.({behind})\.",
                rf"neck\.({dropped})\.",
            ),
        )


class _Neck(nn.Module):
    """The chosen part of SAM's neck: (I, H, W, C) -> (I, C, H, W)."""

    def __init__(self, conv1: nn.Module, layer_norm1: nn.Module) -> None:
        super().__init__()
        self.conv1, self.layer_norm1 = conv1, layer_norm1

    def forward(self, x_IHWC: Tensor) -> Tensor:
        """Project and norm."""
        return self.layer_norm1(self.conv1(x_IHWC.permute(0, 3, 1, 2)))


class _ChannelsFirst(nn.Module):
    def forward(self, x_IHWC: Tensor) -> Tensor:
        """No neck: the layout changes, the numbers do not."""
        return x_IHWC.permute(0, 3, 1, 2)


def _neck(published: Any, kind: str) -> nn.Module:
    if kind == "published":
        return published
    return _Neck(published.conv1, published.layer_norm1) if kind == "first" else _ChannelsFirst()
