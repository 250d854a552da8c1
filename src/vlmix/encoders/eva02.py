"""EVA-02 as a detector's backbone: windows with a few global blocks, rotary positions, SwiGLU.

The defaults are EVA-02-L at 1024 pixels (Fang et al., arXiv:2303.11331, detection variant): 64 x 64 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar, Literal, Self

import torch
import transformers.initialization as init
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from timm.models.eva import EvaBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlmix.core.errors import PlanError
from vlmix.core.initial import fan_in
from vlmix.core.interfaces import VisionEncoder
from vlmix.core.parts import ENCODERS
from vlmix.core.tensors import FeatureMap, VisionSpec
from vlmix.encoders._pixels import encoder_input
from vlmix.encoders._vit import VitSettings, fewer_blocks, resampled_table, table_side, vit_spec
from vlmix.encoders._weights import load_safetensors

_NORM_EPS = 1e-6
_ROTATED = 4  # channels of a head that share one frequency: two axes, sine and cosine
_DETECTOR = "eva02_L_coco_det_sys_o365.pth"
_FILES = (
    "model.safetensors",
    f"eva02/det/{_DETECTOR}",
    _DETECTOR,
)  # the second as its authors' hub page has it

# What a block's tensors are called in the authors' code, and here as in timm.
DETECTOR_NAMES = (
    ("attn.q_bias", "attn.q_proj.bias"),
    ("attn.v_bias", "attn.v_proj.bias"),
    ("mlp.w1.", "mlp.fc1_g."),
    ("mlp.w2.", "mlp.fc1_x."),
    ("mlp.w3.", "mlp.fc2."),
    ("mlp.ffn_ln.", "mlp.norm."),
)
# The rest of the detector, and rotations, which are computed.
_UNUSED = (r"backbone\.", r"proposal_generator\.", r"roi_heads\.", r"rope_", r"blocks\.\d+\.attn\.rope\.")


class Eva02Settings(VitSettings):
    """Sizes of the tower.

    ``window`` cells on a side attend among themselves, except in the blocks of ``global_blocks``.
    ``rope_grid`` is the side of the grid whose positions the rotations were trained on; other grids are
    squeezed onto it. ``table_size`` is the side of the pictures the absolute positions were trained on.
    """

    kind: Literal["eva02"] = "eva02"  # pyright: ignore[reportIncompatibleVariableOverride]
    image_size: int = 1024
    patch_size: int = 16
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp: int = 2730
    window: PositiveInt = 16
    global_blocks: tuple[NonNegativeInt, ...] = (2, 5, 8, 11, 14, 17, 20, 23)
    rope_grid: PositiveInt = 16
    rope_theta: PositiveFloat = 10000.0
    table_size: PositiveInt | None = 224
    lengths: ClassVar[tuple[str, ...]] = ("window",)

    def shrunk(self, factor: int) -> Self:
        """As every vision transformer, with global blocks among those that are left."""
        small = super().shrunk(factor)
        return small.changed(global_blocks=fewer_blocks(self.global_blocks, small.layers))

    @classmethod
    def tiny(cls) -> Self:
        """Two blocks, one of them global, windows of 2 x 2, and a position table of another size."""
        return cls(
            image_size=32,
            patch_size=8,
            width=16,
            layers=2,
            heads=2,
            mlp=21,
            window=2,
            global_blocks=(1,),
            rope_grid=2,
            table_size=24,
        )


class _Tower(nn.Module):
    def __init__(self, settings: Eva02Settings, blocks: int) -> None:
        super().__init__()
        width, patch = settings.width, settings.patch_size
        self.patch_embed = nn.Conv2d(3, width, patch, stride=patch)
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + table_side(settings) ** 2, width))
        self.blocks = nn.ModuleList(
            EvaBlock(
                width,
                settings.heads,
                qkv_fused=False,
                mlp_ratio=(settings.mlp + 0.5) / width,  # timm rounds the product down
                swiglu_mlp=True,
                scale_mlp=True,
                num_prefix_tokens=0,
                norm_layer=partial(nn.LayerNorm, eps=_NORM_EPS),
            )
            for _ in range(blocks)
        )


@ENCODERS.register("eva02")
class Eva02Encoder(VisionEncoder):
    """EVA-02's tower up to the chosen layer; no norm follows it."""

    settings_class = Eva02Settings
    # transformers sets these two on every module that has the first when checkpointing is switched on.
    gradient_checkpointing: bool = False
    _gradient_checkpointing_func: Callable[..., Tensor] = staticmethod(checkpoint)

    def __init__(self, settings: Eva02Settings) -> None:
        super().__init__(settings)
        self.settings, self.weights = settings, settings.weights
        self.tower = _Tower(settings, self.spec.blocks)

    @classmethod
    def plan(cls, settings: Eva02Settings) -> VisionSpec:
        """See ``vit_spec``.

        Raises:
            PlanError: also if the grid is no whole number of windows, or a head's channels do not divide into
                rotations.

        """
        spec = vit_spec(settings)
        if spec.grid[0] % settings.window:
            raise PlanError(
                f"eva02: a grid of {spec.grid} is no whole number of windows of {settings.window}"
            )
        if (settings.width // settings.heads) % _ROTATED:
            raise PlanError(
                f"eva02: a head of {settings.width // settings.heads} channels does not divide into "
                f"rotations; width / heads must be a multiple of {_ROTATED}"
            )
        return VisionSpec(spec.grid, spec.channels, blocks=spec.blocks)

    def reset(self) -> None:
        """Start from weights that suit any width, and positions as the authors draw them."""
        fan_in(self.tower)
        init.trunc_normal_(self.tower.pos_embed, std=0.02)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Patches with absolute positions: (I, H, W, C)."""
        x_I3SS = encoder_input(pixel_values, self.settings, self.tower.patch_embed.weight.dtype)
        found = FeatureMap.from_nchw(self.tower.patch_embed(x_I3SS))
        table_NC = self.tower.pos_embed[0, 1:]  # the first row is a class token's, which a detector has not
        positions = resampled_table(table_NC, table_side(self.settings), self.spec.grid, antialias=False)
        return (found.tokens + positions).unflatten(1, self.spec.grid)

    def block(self, index: int, x: Tensor) -> Tensor:
        """Transformer block ``index``: (I, H, W, C), over all cells or window by window."""
        rows, columns = self.spec.grid
        if index in self.settings.global_blocks:
            y_INC = self._run(index, x.flatten(1, 2), self._rotations(rows, x))
            return y_INC.unflatten(1, self.spec.grid)
        side = self.settings.window
        windows_INMC = FeatureMap(x.flatten(1, 2), self.spec.grid).windows((side, side))
        y_JMC = self._run(index, windows_INMC.flatten(0, 1), self._rotations(side, x))
        y = y_JMC.view(x.shape[0], rows // side, columns // side, side, side, -1)
        return y.transpose(2, 3).reshape(x.shape)

    def finish(self, x: Tensor) -> FeatureMap:
        """The map as it is."""
        return FeatureMap(x.flatten(1, 2), self.spec.grid)

    def load_weights(self, source: str) -> None:
        """Load a tower from a hub id, folder or file: in timm's names, or the detector as it was published.

        The published file is a pickle; ``vlmix.core.pickles`` says how it is read.

        Raises:
            CheckpointError: if a tensor is missing, left over or of another shape, or the pickle is refused.

        """
        behind = "|".join(str(layer) for layer in range(self.spec.blocks, self.settings.layers)) or "none"
        unused = (*_UNUSED, rf"blocks\.({behind})\.")
        load_safetensors(self.tower, source, files=_FILES, rename=_renamed, unused=unused)

    def _run(self, index: int, x_JMC: Tensor, rotations: Tensor) -> Tensor:
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(self.tower.blocks[index], x_JMC, rotations)
        return self.tower.blocks[index](x_JMC, rotations)

    def _rotations(self, side: int, like: Tensor) -> Tensor:
        """Sine and cosine of every cell's angles on a square of ``side`` cells: (N, 2 D)."""
        pairs = self.settings.width // self.settings.heads // _ROTATED
        share = torch.arange(pairs, device=like.device, dtype=torch.float32) / pairs
        steps = torch.arange(side, device=like.device, dtype=torch.float32) * (self.settings.rope_grid / side)
        angles_HD = (steps[:, None] * self.settings.rope_theta**-share).repeat_interleave(2, dim=-1)
        rows = angles_HD[:, None].expand(side, side, -1)
        angles_ND = torch.cat((rows, rows.transpose(0, 1)), dim=-1).flatten(0, 1)
        return torch.cat((angles_ND.sin(), angles_ND.cos()), dim=-1)


def _renamed(name: str) -> str:
    for theirs, ours in (("backbone.net.", ""), ("patch_embed.proj.", "patch_embed."), *DETECTOR_NAMES):
        name = name.replace(theirs, ours)
    return name
