"""ConvNeXt: any of its four stages, brought to the finest chosen grid and stacked on channels.

The defaults are OpenCLIP's ConvNeXt-L at 768 pixels with all stages, Mini-Gemini's high-resolution eye.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Self

import torch
import transformers.initialization as init
from pydantic import Field, PositiveFloat, PositiveInt
from timm.models.convnext import ConvNeXt, ConvNeXtBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlmix.core.errors import PlanError
from vlmix.core.initial import fan_in
from vlmix.core.interfaces import VisionEncoder
from vlmix.core.parts import ENCODERS
from vlmix.core.tensors import FeatureMap, Grid, Resampling, VisionSpec
from vlmix.encoders._pixels import ImageSettings, encoder_input
from vlmix.encoders._weights import load_safetensors

PerStage = tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt]
STRIDES = (4, 8, 16, 32)


class ConvnextSettings(ImageSettings):
    """Sizes of the network and which stages to read.

    ``stages`` in ascending order, counted from 0; the network ends with the last of them. Several are brought
    to the finest one's grid, or straight to the one that ``resample`` asks for. ``norm_eps`` is
    1e-6 for large, 1e-5 for xxlarge. ``layer_scale`` is the initial value of the residual scales;
    ``drop_path`` the share of residual branches dropped in training, at the deepest block.
    """

    kind: Literal["convnext"] = "convnext"  # pyright: ignore[reportIncompatibleVariableOverride]
    image_size: PositiveInt = 768
    depths: PerStage = (3, 3, 27, 3)
    widths: PerStage = (192, 384, 768, 1536)
    stages: tuple[int, ...] = (0, 1, 2, 3)
    norm_eps: PositiveFloat = 1e-6
    layer_scale: PositiveFloat = 1e-6
    drop_path: float = Field(default=0.0, ge=0.0, lt=1.0)

    @classmethod
    def tiny(cls) -> Self:
        """Four stages of one block, read at 8 x 8."""
        return cls(image_size=32, depths=(1, 1, 1, 1), widths=(4, 6, 8, 10), layer_scale=1.0)


@ENCODERS.register("convnext")
class ConvnextEncoder(VisionEncoder):
    """ConvNeXt without its head.

    One stage alone runs stage by stage; several are one block, because each is kept for the stack.
    """

    settings_class = ConvnextSettings
    # transformers sets these two on every module that has the first when checkpointing is switched on.
    gradient_checkpointing: bool = False
    _gradient_checkpointing_func: Callable[..., Tensor] = staticmethod(checkpoint)

    def __init__(self, settings: ConvnextSettings) -> None:
        super().__init__(settings)
        self.settings, self.weights = settings, settings.weights
        self.tower = ConvNeXt(
            num_classes=0,
            depths=settings.depths,
            dims=settings.widths,
            norm_eps=settings.norm_eps,
            ls_init_value=settings.layer_scale,
            drop_path_rate=settings.drop_path,
        )
        self.tower.set_submodule("head", nn.Identity())
        self.tower.stages = self.tower.stages[: settings.stages[-1] + 1]

    @classmethod
    def plan(cls, settings: ConvnextSettings) -> VisionSpec:
        """The finest chosen stage's grid with the channels of all of them.

        Raises:
            PlanError: if the stages are none, unknown, or out of order, or the picture does not divide.

        """
        stages = settings.stages
        if not stages or list(stages) != sorted({*stages} & {*range(4)}):
            raise PlanError(f"convnext: stages must be some of 0, 1, 2, 3 in ascending order, not {stages}")
        stride = STRIDES[stages[-1]]
        if settings.image_size % stride:
            whole = settings.image_size // stride
            near = " and ".join(str(n * stride) for n in (whole, whole + 1) if n)
            raise PlanError(
                f"convnext: image_size {settings.image_size} is no multiple of {stride}, the stride of stage "
                f"{stages[-1]}; take {near}"
            )
        side = settings.image_size // STRIDES[stages[0]]
        if len(stages) == 1:
            return VisionSpec((side, side), settings.widths[stages[0]], blocks=stages[0] + 1)
        sides = [settings.image_size // STRIDES[stage] for stage in stages]
        levels = [VisionSpec((n, n), settings.widths[i]) for n, i in zip(sides, stages, strict=True)]
        channels = sum(level.channels for level in levels)
        grid, _ = _stacking(settings, (side, side))
        return VisionSpec(grid, channels, levels=tuple(levels))

    def reset(self) -> None:
        """Start from weights that suit any width, and the residual scales from ``layer_scale``."""
        fan_in(self.tower)
        for module in self.tower.modules():
            if isinstance(module, ConvNeXtBlock) and module.gamma is not None:
                init.constant_(module.gamma, self.settings.layer_scale)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """The stem: (I, C, H, W) at a quarter of the picture's side."""
        stem: Any = self.tower.stem
        return stem(encoder_input(pixel_values, self.settings, stem[0].weight.dtype))

    def block(self, index: int, x: Tensor) -> Tensor:
        """Stage ``index``, or all stages and their stack where several are read: (I, C, H, W)."""
        if len(self.settings.stages) == 1:
            return self._stage(index, x)
        grid, mode = _stacking(self.settings, self.spec.grid)
        stacked = torch.cat([level.resampled(grid, mode).tokens for level in self._levels(x)], dim=-1)
        return FeatureMap(stacked, grid).to_nchw()

    def finish(self, x: Tensor) -> FeatureMap:
        """The map's positions as tokens."""
        return FeatureMap.from_nchw(x)

    def levels(self, pixel_values: Tensor) -> list[FeatureMap]:
        """The chosen stages, each on its own grid, where several are read and nothing resamples them."""
        if not self.spec.levels or self.resample is not None:
            return [self(pixel_values)]
        return self._levels(self.embed(pixel_values))

    def load_weights(self, source: str) -> None:
        """Load an OpenCLIP model or a timm ConvNeXt from a hub id or folder.

        Raises:
            CheckpointError: if a tensor is missing, left over or of another shape.

        """
        behind = "|".join(str(stage) for stage in range(self.settings.stages[-1] + 1, 4)) or "none"
        load_safetensors(
            self.tower,
            source,
            files=("open_clip_model.safetensors", "model.safetensors"),
            rename=lambda name: name.removeprefix("visual.trunk."),
            unused=(*_HEADS, rf"stages\.({behind})\."),
        )

    def _levels(self, x: Tensor) -> list[FeatureMap]:
        """Run every stage and keep the chosen ones."""
        found = []
        for stage in range(self.settings.stages[-1] + 1):
            x = self._stage(stage, x)
            if stage in self.settings.stages:
                found.append(FeatureMap.from_nchw(x))
        return found

    def _stage(self, index: int, x: Tensor) -> Tensor:
        stage: Any = self.tower.stages[index]
        x = stage.downsample(x)
        for block in stage.blocks:
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(block, x)
            else:
                x = block(x)
        return x


def _stacking(settings: ConvnextSettings, finest: Grid) -> tuple[Grid, Resampling]:
    """Where several stages meet and how they get there: at once where their stack would be interpolated."""
    wanted = settings.resample
    if wanted is None or wanted.mode in ("token_major", "channel_major"):
        return finest, "bilinear"
    return wanted.grid, wanted.mode


# The classifier, OpenCLIP's projection and its text side.
_HEADS = (
    r"head\.",
    r"norm_pre\.",
    r"visual\.head\.",
    r"logit_(scale|bias)$",
    r"text(_projection$|\.)",
    r"(token|positional)_embedding",
    r"transformer\.",
    r"ln_final\.",
    r"attn_mask$",
)
