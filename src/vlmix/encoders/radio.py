"""RADIO: one tower taught by several models; spatial tokens, with its summaries behind them by choice.

The defaults are C-RADIOv4-H at 512 pixels (Ranzinger et al., arXiv:2601.17237; first arXiv:2312.06709). Names
and arithmetic follow the authors' source and transformers' and timm's ports; no published file was at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, Self, cast

import torch
import torch.nn.functional as F
import transformers.initialization as init
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlmix.core.errors import PlanError
from vlmix.core.initial import fan_in
from vlmix.core.interfaces import VisionEncoder
from vlmix.core.parts import ENCODERS
from vlmix.core.tensors import FeatureMap, VisionSpec
from vlmix.encoders._pixels import encoder_input
from vlmix.encoders._vit import VitSettings, table_side, vit_spec
from vlmix.encoders._weights import load_safetensors

_NORM_EPS = 1e-6


class RadioSettings(VitSettings):
    """Sizes of the tower.

    ``class_tokens`` counts its class tokens, one for each teacher or group of teachers, ``registers`` those
    that nobody reads. ``summary`` drops the class tokens, or appends those of ``summary_tokens`` (counted
    from 0) to every spatial token's channels. ``table_corners`` aligns the corners when positions are
    resampled: true of C-RADIOv3-B and -H, false of v3-L, -g and v4. ``layer_scale`` is the initial value of
    the residual scales, which only v3-B and -L have. ``mean`` and ``std`` are the constants of the authors'
    input conditioner; those a file may hold are not read.
    """

    kind: Literal["radio"] = "radio"  # pyright: ignore[reportIncompatibleVariableOverride]
    image_size: int = 512
    patch_size: int = 16
    width: int = 1280
    layers: int = 32
    heads: int = 16
    mlp: int = 5120
    table_size: PositiveInt | None = 2048
    table_corners: bool = False
    class_tokens: PositiveInt = 3
    registers: NonNegativeInt = 7
    summary: Literal["drop", "append"] = "drop"
    summary_tokens: tuple[NonNegativeInt, ...] = (0, 1)
    layer_scale: PositiveFloat | None = None

    @classmethod
    def tiny(cls) -> Self:
        """Three blocks of which two run, two summaries of three, residual scales, a table of another size."""
        return cls(
            image_size=32,
            patch_size=8,
            width=16,
            layers=3,
            heads=2,
            mlp=32,
            table_size=48,
            registers=1,
            summary="append",
            layer_scale=1.0,
            feature_layer=-2,
        )


class _Tower(nn.Module):
    def __init__(self, settings: RadioSettings, blocks: int) -> None:
        super().__init__()
        width, norm = settings.width, cast("type[nn.Module]", partial(nn.LayerNorm, eps=_NORM_EPS))
        self.embedder = nn.Linear(3 * settings.patch_size**2, width, bias=False)
        self.pos_embed = nn.Parameter(torch.zeros(1, table_side(settings) ** 2, width))
        self.tokens = nn.Parameter(torch.zeros(settings.class_tokens + settings.registers, width))
        self.blocks = nn.ModuleList(
            Block(
                width,
                settings.heads,
                mlp_ratio=(settings.mlp + 0.5) / width,  # timm rounds the product down
                qkv_bias=True,
                init_values=settings.layer_scale,
                norm_layer=norm,
            )
            for _ in range(blocks)
        )


@ENCODERS.register("radio")
class RadioEncoder(VisionEncoder):
    """RADIO's tower up to the chosen layer, without its teachers' heads; no norm follows it.

    Positions are always those of a whole picture: the random crops of the table with which RADIO itself was
    trained are not drawn here.
    """

    settings_class = RadioSettings
    # transformers sets these two on every module that has the first when checkpointing is switched on.
    gradient_checkpointing: bool = False
    _gradient_checkpointing_func: Callable[..., Tensor] = staticmethod(checkpoint)

    def __init__(self, settings: RadioSettings) -> None:
        super().__init__(settings)
        self.settings, self.weights = settings, settings.weights
        self.tower = _Tower(settings, self.spec.blocks)

    @classmethod
    def plan(cls, settings: RadioSettings) -> VisionSpec:
        """See ``vit_spec``; appended summaries add their channels.

        Raises:
            PlanError: also if a summary is to be appended that no class token is.

        """
        spec = vit_spec(settings)
        if settings.summary == "drop":
            return spec
        chosen = settings.summary_tokens
        if not chosen or max(chosen) >= settings.class_tokens:
            raise PlanError(
                f"radio: summary_tokens {list(chosen)} must be some of 0 to {settings.class_tokens - 1}, the "
                "class tokens"
            )
        return VisionSpec(spec.grid, settings.width * (1 + len(chosen)), blocks=spec.blocks)

    def reset(self) -> None:
        """Start from weights that suit any width, positions and tokens as the authors draw them."""
        fan_in(self.tower)
        for parameter in (self.tower.pos_embed, self.tower.tokens):
            init.normal_(parameter, std=self.settings.width**-0.5)
        for name, parameter in self.tower.named_parameters():
            if name.endswith(".gamma"):
                init.constant_(parameter, self.settings.layer_scale or 1.0)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Class tokens, registers and patches with positions: (I, class_tokens + registers + N, C)."""
        patch, side = self.settings.patch_size, table_side(self.settings)
        x_I3SS = encoder_input(pixel_values, self.settings, self.tower.embedder.weight.dtype)
        patches_INP = F.unfold(x_I3SS, patch, stride=patch).transpose(
            1, 2
        )  # within one: colours, rows, columns
        mode = "bilinear_corners" if self.settings.table_corners else "bilinear"
        positions = FeatureMap(self.tower.pos_embed, (side, side)).resampled(self.spec.grid, mode).tokens
        prefix = self.tower.tokens.expand(x_I3SS.shape[0], -1, -1)
        return torch.cat((prefix, self.tower.embedder(patches_INP) + positions), dim=1)

    def block(self, index: int, x: Tensor) -> Tensor:
        """Transformer block ``index``."""
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(self.tower.blocks[index], x)
        return self.tower.blocks[index](x)

    def finish(self, x: Tensor) -> FeatureMap:
        """Spatial tokens, with the chosen summaries behind each one's channels where the settings say so."""
        x_INC = x[:, -self.spec.tokens :]
        if self.settings.summary == "append":
            chosen = torch.cat([x[:, token] for token in self.settings.summary_tokens], dim=-1)
            x_INC = torch.cat((x_INC, chosen[:, None].expand(-1, self.spec.tokens, -1)), dim=-1)
        return FeatureMap(x_INC, self.spec.grid)

    def load_weights(self, source: str) -> None:
        """Load a plain vision transformer, as C-RADIOv3 and v4 are, from a hub id or folder.

        Raises:
            CheckpointError: if a tensor is missing, left over or of another shape, as in models built from
                DINOv2's blocks (RADIOv2.5-g, C-RADIOv2-g) or with norms inside their MLPs.

        """
        behind = "|".join(str(layer) for layer in range(self.spec.blocks, self.settings.layers)) or "none"
        load_safetensors(
            self.tower,
            source,
            files=("model.safetensors",),
            rename=_ours,
            unused=(*_AROUND, rf"blocks\.({behind})\."),
        )


# Beside the tower: the conditioner's constants, teachers' heads, normalisers of features, moving pictures.
_AROUND = (
    r"radio_model\.(summary_idxs$|(input_conditioner|adaptors|(inter_)?feature_normalizer)\.)",
    r"video_embedder\.",
)
_RENAMES = (
    ("radio_model.model.", ""),
    ("patch_generator.", ""),
    ("cls_token.token", "tokens"),
    ("layer_scale", "ls"),  # transformers' name for the residual scales
    (".lambda1", ".gamma"),
    (".grandma", ".gamma"),  # the authors' name for them, which keeps loaders from renaming it
)


def _ours(name: str) -> str:
    for theirs, ours in _RENAMES:
        name = name.replace(theirs, ours)
    return name
