"""SigLIP vision transformer: any layer's tokens; it has no class token.

The defaults are SigLIP so400m/14 at 384 pixels, read after its last block and final norm. SigLIP 2 models of
fixed resolution are stored in the same form and load here; those of any shape (NaFlex) are ``siglip2``.
"""

from __future__ import annotations

from typing import Literal, Self

from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from vlmix.core.errors import PlanError
from vlmix.core.interfaces import VisionEncoder
from vlmix.core.parts import ENCODERS
from vlmix.core.tensors import FeatureMap, VisionSpec
from vlmix.encoders._pixels import Colour, encoder_input
from vlmix.encoders._vit import VitSettings, resampled_table, table_side, vit_spec
from vlmix.encoders._weights import load_tower


class SiglipSettings(VitSettings):
    """Sizes of the tower; ``final_norm`` applies the published last norm to the chosen layer.

    ``drop_first_patch`` leaves out the patch in the upper left corner, which MoE-LLaVA's code takes for a
    class token: 728 tokens of 729, a strip that has no rows.
    """

    kind: Literal["siglip"] = "siglip"  # pyright: ignore[reportIncompatibleVariableOverride]
    image_size: int = 384
    patch_size: int = 14
    width: int = 1152
    layers: int = 27
    heads: int = 16
    mlp: int = 4304
    final_norm: bool = True
    drop_first_patch: bool = False
    mean: Colour = (0.5, 0.5, 0.5)
    std: Colour = (0.5, 0.5, 0.5)

    @classmethod
    def tiny(cls) -> Self:
        """Three blocks of which two run, the final norm, and a grid of 4 x 4."""
        return cls(image_size=32, patch_size=8, width=16, layers=3, heads=2, mlp=32, feature_layer=-2)


@ENCODERS.register("siglip")
class SiglipEncoder(VisionEncoder):
    """SigLIP's vision tower up to the chosen layer, without its pooling head."""

    settings_class = SiglipSettings

    def __init__(self, settings: SiglipSettings) -> None:
        super().__init__(settings)
        self.settings, self.weights = settings, settings.weights
        self.tower = SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=settings.width,
                intermediate_size=settings.mlp,
                num_hidden_layers=self.spec.blocks,
                num_attention_heads=settings.heads,
                image_size=settings.table_size or settings.image_size,
                patch_size=settings.patch_size,
                vision_use_head=False,
            )
        )
        if not settings.final_norm:
            self.tower.set_submodule("post_layernorm", nn.Identity())

    @classmethod
    def plan(cls, settings: SiglipSettings) -> VisionSpec:
        """See ``vit_spec``; 384 pixels in patches of 14 leave a margin that SigLIP itself never reads.

        Raises:
            PlanError: also if a patch is dropped and something needs rows and columns.

        """
        spec = vit_spec(_whole(settings))
        if not settings.drop_first_patch:
            return spec
        if settings.resample is not None or settings.sees == "picture":
            raise PlanError(
                "siglip: `drop_first_patch` leaves a strip without rows: leave out `resample` and `sees`"
            )
        return VisionSpec((1, spec.tokens - 1), spec.channels, blocks=spec.blocks)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Patches with positions: (I, N, C)."""
        parts = self.tower.embeddings
        x_I3SS = encoder_input(pixel_values, self.settings, parts.patch_embedding.weight.dtype)
        x_INC = FeatureMap.from_nchw(parts.patch_embedding(x_I3SS)).tokens
        table_NC = parts.position_embedding.weight
        grid = vit_spec(_whole(self.settings)).grid
        return x_INC + resampled_table(table_NC, table_side(self.settings), grid)

    def block(self, index: int, x: Tensor) -> Tensor:
        """Transformer block ``index``."""
        return self.tower.encoder.layers[index](x, None)

    def finish(self, x: Tensor) -> FeatureMap:
        """Every token, or all but the first, normed where the settings say so."""
        return FeatureMap(self.tower.post_layernorm(x)[:, -self.spec.tokens :], self.spec.grid)

    def load_weights(self, source: str) -> None:
        """Load a SigLIP model or its vision tower from a hub id or folder.

        Raises:
            CheckpointError: if sizes differ, or a tensor is missing, left over or of another shape.

        """
        unused = (r"head\.",) if self.settings.final_norm else (r"head\.", r"post_layernorm\.")
        load_tower(self.tower, source, layers=self.settings.layers, unused=unused)


def _whole(settings: SiglipSettings) -> SiglipSettings:
    """The settings with sizes cut to whole patches."""
    sizes = {"image_size": settings.image_size, "table_size": settings.table_size}
    patch = settings.patch_size
    return settings.model_copy(
        update={key: max(size // patch, 1) * patch for key, size in sizes.items() if size is not None}
    )
