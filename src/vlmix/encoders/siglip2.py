"""SigLIP 2 NaFlex: as many patches as a square has, in whatever rectangle the picture's shape asks for.

The defaults are SigLIP 2 so400m/16 with 256 patches (Tschannen et al., arXiv:2502.14786), read after its last
block and final norm. SigLIP 2 models of fixed resolution are stored as ``siglip`` and load into that encoder.
"""

from __future__ import annotations

from typing import Literal, Self

from torch import Tensor, nn
from transformers import Siglip2VisionConfig, Siglip2VisionModel
from transformers.models.siglip2.image_processing_siglip2 import get_image_size_for_max_num_patches

from vlmix.core.interfaces import VisionEncoder
from vlmix.core.parts import ENCODERS
from vlmix.core.tensors import FeatureMap, VisionSpec
from vlmix.encoders._aspect import cut_patches, on_grid, planned_map
from vlmix.encoders._pixels import Colour, encoder_input, picture_size
from vlmix.encoders._vit import VitSettings, resampled_table, table_side, vit_spec
from vlmix.encoders._weights import load_tower


class Siglip2Settings(VitSettings):
    """Sizes of the tower.

    A picture of any shape gets at most as many patches as a square of ``image_size``. ``table_size`` is 256
    for the published models, whose table has 16 x 16 rows; ``final_norm`` applies the published last norm
    to the chosen layer.
    """

    kind: Literal["siglip2"] = "siglip2"  # pyright: ignore[reportIncompatibleVariableOverride]
    image_size: int = 256
    patch_size: int = 16
    width: int = 1152
    layers: int = 27
    heads: int = 16
    mlp: int = 4304
    table_size: int | None = 256
    final_norm: bool = True
    mean: Colour = (0.5, 0.5, 0.5)
    std: Colour = (0.5, 0.5, 0.5)

    @classmethod
    def tiny(cls) -> Self:
        """Three blocks of which two run, the final norm, a grid of 4 x 4 and a table of 3 x 3."""
        return cls(
            image_size=32,
            patch_size=8,
            width=16,
            layers=3,
            heads=2,
            mlp=32,
            table_size=24,
            feature_layer=-2,
        )


@ENCODERS.register("siglip2")
class Siglip2Encoder(VisionEncoder):
    """SigLIP 2's NaFlex tower up to the chosen layer, without its pooling head."""

    settings_class = Siglip2Settings

    def __init__(self, settings: Siglip2Settings) -> None:
        super().__init__(settings)
        self.settings, self.weights = settings, settings.weights
        self.tower = Siglip2VisionModel(
            Siglip2VisionConfig(
                hidden_size=settings.width,
                intermediate_size=settings.mlp,
                num_hidden_layers=self.spec.blocks,
                num_attention_heads=settings.heads,
                patch_size=settings.patch_size,
                num_patches=table_side(settings) ** 2,
                vision_use_head=False,
            )
        )
        if not settings.final_norm:
            self.tower.set_submodule("post_layernorm", nn.Identity())

    @classmethod
    def plan(cls, settings: Siglip2Settings) -> VisionSpec:
        """See ``vit_spec``: the grid of a square picture, to which any other picture's map is resampled."""
        return vit_spec(settings)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Patches with positions: (I, N, C) on the planned grid, (I, H, W, C) on a rectangle's."""
        parts, patch = self.tower.embeddings, self.settings.patch_size
        size = get_image_size_for_max_num_patches(*picture_size(pixel_values), patch, self.spec.tokens)
        x_I3HW = encoder_input(pixel_values, self.settings, parts.patch_embedding.weight.dtype, size)
        grid = (size[0] // patch, size[1] // patch)
        table_NC = parts.position_embedding.weight
        positions = resampled_table(table_NC, table_side(self.settings), grid, mode="bilinear")
        return on_grid(parts.patch_embedding(cut_patches(x_I3HW, patch)) + positions, grid, self.spec.grid)

    def block(self, index: int, x: Tensor) -> Tensor:
        """Transformer block ``index``."""
        return self.tower.encoder.layers[index](x.flatten(1, -2), None).view(x.shape)

    def finish(self, x: Tensor) -> FeatureMap:
        """Every token, normed where the settings say so."""
        return planned_map(self.tower.post_layernorm(x), self.spec.grid)

    def load_weights(self, source: str) -> None:
        """Load a SigLIP 2 NaFlex model or its vision tower from a hub id or folder.

        Raises:
            CheckpointError: if sizes differ, or a tensor is missing, left over or of another shape.

        """
        unused = (r"head\.",) if self.settings.final_norm else (r"head\.", r"post_layernorm\.")
        load_tower(self.tower, source, layers=self.settings.layers, unused=unused)
