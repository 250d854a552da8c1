"""CLIP vision transformer: any layer's patch tokens, without the class token.

The defaults are CLIP ViT-L/14 at 336 pixels read as LLaVA does: the state before the last block, no norm.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
import transformers.initialization as init
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from vlmix.core.errors import PlanError
from vlmix.core.initial import fan_in
from vlmix.core.interfaces import VisionEncoder
from vlmix.core.parts import ENCODERS
from vlmix.core.tensors import FeatureMap, VisionSpec
from vlmix.encoders._pixels import encoder_input
from vlmix.encoders._vit import VitSettings, resampled_table, table_side, vit_spec
from vlmix.encoders._weights import load_tower

POSITION_STD = 0.5


class ClipSettings(VitSettings):
    """Sizes of the tower, and when the class token leaves.

    ``class_token``: ``drop_after`` keeps it through the blocks (LLaVA, Mini-Gemini); ``drop_before`` takes
    it out ahead of the first norm (Eagle, LLaVA-HR), so that no block ever sees it; ``keep`` gives it before
    the patches (LLaVA's ``cls_patch``), a strip of tokens that has no rows.
    """

    kind: Literal["clip"] = "clip"  # pyright: ignore[reportIncompatibleVariableOverride]
    image_size: int = 336
    patch_size: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp: int = 4096
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    feature_layer: int = -2
    class_token: Literal["drop_after", "drop_before", "keep"] = "drop_after"

    @classmethod
    def tiny(cls) -> Self:
        """Three blocks of which two run, and a grid of 4 x 4."""
        return cls(image_size=32, patch_size=8, width=16, layers=3, heads=2, mlp=32)


@ENCODERS.register("clip")
class ClipEncoder(VisionEncoder):
    """CLIP's vision tower up to the chosen layer."""

    settings_class = ClipSettings

    def __init__(self, settings: ClipSettings) -> None:
        super().__init__(settings)
        self.settings, self.weights = settings, settings.weights
        self.tower = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=settings.width,
                intermediate_size=settings.mlp,
                num_hidden_layers=self.spec.blocks,
                num_attention_heads=settings.heads,
                image_size=settings.table_size or settings.image_size,
                patch_size=settings.patch_size,
                hidden_act=settings.activation,
            )
        )
        # Only the pooled class token passes through this norm, which no feature here reads.
        self.tower.set_submodule("post_layernorm", nn.Identity())

    @classmethod
    def plan(cls, settings: ClipSettings) -> VisionSpec:
        """See ``vit_spec``.

        Raises:
            PlanError: also if the class token is kept and something needs rows and columns.

        """
        spec = vit_spec(settings)
        if settings.class_token != "keep":
            return spec
        if settings.resample is not None or settings.sees == "picture":
            raise PlanError(
                "clip: with `class_token: keep` tokens are a strip without rows: leave out `resample`, `sees`"
            )
        return VisionSpec((1, spec.tokens + 1), spec.channels, blocks=spec.blocks)

    @property
    def inert_parameters(self) -> tuple[str, ...]:
        """The class token's embedding where it leaves before anything reads it."""
        dropped = self.settings.class_token == "drop_before"
        return ("tower.embeddings.class_embedding",) if dropped else ()

    def reset(self) -> None:
        """Start from patches of size one with positions that stand out among them.

        CLIP's own constants make every patch of an even background look alike, so a small tower trained from
        scratch spends its first thousand steps finding out where things are.
        """
        fan_in(self.tower.embeddings)
        init.normal_(self.tower.embeddings.position_embedding.weight, std=POSITION_STD)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Patches, class token and positions, normed: (I, N or N + 1, C)."""
        parts = self.tower.embeddings
        x_I3SS = encoder_input(pixel_values, self.settings, parts.patch_embedding.weight.dtype)
        table_NC = parts.position_embedding.weight
        x_INC = FeatureMap.from_nchw(parts.patch_embedding(x_I3SS)).tokens
        grid = vit_spec(self.settings).grid
        x_INC = x_INC + resampled_table(table_NC[1:], table_side(self.settings), grid)
        if self.settings.class_token != "drop_before":
            class_I1C = (parts.class_embedding + table_NC[0]).expand(x_INC.shape[0], 1, -1)
            x_INC = torch.cat((class_I1C, x_INC), dim=1)
        return self.tower.pre_layrnorm(x_INC)

    def block(self, index: int, x: Tensor) -> Tensor:
        """Transformer block ``index``."""
        return self.tower.encoder.layers[index](x, None)

    def finish(self, x: Tensor) -> FeatureMap:
        """Patch tokens, behind the class token where it is kept."""
        return FeatureMap(x[:, -self.spec.tokens :], self.spec.grid)

    def load_weights(self, source: str) -> None:
        """Load a CLIP model or its vision tower from a hub id or folder.

        Raises:
            CheckpointError: if sizes differ, or a tensor is missing, left over or of another shape.

        """
        load_tower(self.tower, source, layers=self.settings.layers, unused=(r"post_layernorm\.",))
