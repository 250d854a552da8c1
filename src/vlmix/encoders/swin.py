"""Swin Transformer: any of its four stages, brought to the finest chosen grid and stacked on channels.

The defaults are Swin-B at 384 pixels with windows of 12 (Liu et al., arXiv:2103.14030), read after its last
stage and final norm: 12 x 12 tokens.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
import transformers.initialization as init
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from transformers import SwinConfig, SwinModel
from transformers.models.swin.modeling_swin import SwinAttention

from vlmix.core.errors import PlanError
from vlmix.core.initial import fan_in
from vlmix.core.interfaces import VisionEncoder
from vlmix.core.parts import ENCODERS
from vlmix.core.tensors import FeatureMap, Grid, VisionSpec
from vlmix.encoders._pixels import Colour, ImageSettings, Resize, encoder_input
from vlmix.encoders._vit import resampled_table
from vlmix.encoders._weights import load_safetensors

PerStage = tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt]
_TABLE_STD = 0.02


class SwinSettings(ImageSettings):
    """Sizes of the network and which stages to read.

    ``width`` is the first stage's; each later one has twice the channels. ``window`` cells on a side attend
    among themselves; where the grid does not divide, its last windows are filled with zeros, as transformers
    does. ``table_window`` is the window the position tables were made for, where that is another: they keep
    their size and are resampled on the way in. ``stages`` in ascending order, counted from 0; the network
    ends with the last of them, and a stage is read before its map is halved. ``final_norm`` applies the
    published norm, which only the last stage has. ``drop_path`` is the share of residual branches dropped in
    training, at the deepest block.
    """

    kind: Literal["swin"] = "swin"  # pyright: ignore[reportIncompatibleVariableOverride]
    image_size: PositiveInt = 384
    patch_size: PositiveInt = 4
    width: PositiveInt = 128
    depths: PerStage = (2, 2, 18, 2)
    heads: PerStage = (4, 8, 16, 32)
    mlp_ratio: PositiveFloat = 4.0
    window: PositiveInt = 12
    table_window: PositiveInt | None = None
    stages: tuple[int, ...] = (3,)
    final_norm: bool = True
    drop_path: float = Field(default=0.0, ge=0.0, lt=1.0)
    resize: Resize = "bicubic_antialias"
    mean: Colour = (0.485, 0.456, 0.406)
    std: Colour = (0.229, 0.224, 0.225)

    def shrunk(self, factor: int) -> Self:
        """Patches keep their size, so that every grid shrinks with the picture, and the window with them."""
        window = max(self.window // factor, 1)
        return super().shrunk(factor).changed(patch_size=self.patch_size, window=window)

    @classmethod
    def tiny(cls) -> Self:
        """Grids of 28, 14, 7 and 4, none a whole number of windows; shifted ones in the second stage."""
        return cls(
            image_size=56,
            patch_size=2,
            width=4,
            depths=(1, 2, 1, 1),
            heads=(1, 2, 2, 2),
            mlp_ratio=2.0,
            window=3,
            table_window=2,
        )


@ENCODERS.register("swin")
class SwinEncoder(VisionEncoder):
    """Swin without its classifier.

    One stage alone runs block by block; several are one block, because each is kept for the stack.
    """

    settings_class = SwinSettings

    def __init__(self, settings: SwinSettings) -> None:
        super().__init__(settings)
        self.settings, self.weights = settings, settings.weights
        last = settings.stages[-1]
        self.tower = _tower(settings)
        stages: Any = self.tower.encoder.layers[: last + 1]
        stages[-1].downsample = None
        self.tower.encoder.layers = stages
        if last < 3 or not settings.final_norm:
            self.tower.set_submodule("layernorm", nn.Identity())
        self.places = [(stage, place) for stage in range(last + 1) for place in range(settings.depths[stage])]

    @classmethod
    def plan(cls, settings: SwinSettings) -> VisionSpec:
        """The finest chosen stage's grid with the channels of all of them.

        Raises:
            PlanError: if the stages are none, unknown, or out of order, the picture is no whole number of
                patches, a grid is smaller than the window, or the heads do not share the channels.

        """
        stages, sides = settings.stages, _sides(settings)
        if not stages or list(stages) != sorted({*stages} & {*range(4)}):
            raise PlanError(f"swin: stages must be some of 0, 1, 2, 3 in ascending order, not {stages}")
        for stage in range(stages[-1] + 1):
            width, heads = settings.width * 2**stage, settings.heads[stage]
            if width % heads:
                raise PlanError(f"swin: stage {stage} has {width} channels, no multiple of {heads} heads")
            if sides[stage] < settings.window:
                raise PlanError(
                    f"swin: stage {stage} has {sides[stage]} x {sides[stage]} cells, fewer than the window "
                    f"of {settings.window}; take larger pictures, or a smaller window with `table_window`"
                )
        alone = len(stages) == 1
        channels = sum(settings.width * 2**stage for stage in stages)
        blocks = sum(settings.depths[: stages[0] + 1]) if alone else 1
        return VisionSpec((sides[stages[0]], sides[stages[0]]), channels, blocks=blocks)

    def reset(self) -> None:
        """Start from weights that suit any width, and position tables as the authors draw them."""
        fan_in(self.tower)
        for module in self.tower.modules():
            if isinstance(module, _PositionBias):
                init.trunc_normal_(module.relative_position_bias_table, std=_TABLE_STD)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Patches, normed: (I, N, C) of the first stage."""
        parts = self.tower.embeddings
        dtype = parts.patch_embeddings.projection.weight.dtype
        return parts(encoder_input(pixel_values, self.settings, dtype))[0]

    def block(self, index: int, x: Tensor) -> Tensor:
        """Transformer block ``index``, or all and the stages' stack where several are read: (I, N, C)."""
        if len(self.settings.stages) == 1:
            return self._run(*self.places[index], x)
        maps = []
        for stage, place in self.places:
            x = self._run(stage, place, x)
            if stage in self.settings.stages and place == self.settings.depths[stage] - 1:
                seen = FeatureMap(self._normed(stage, x), self._grid(stage))
                maps.append(seen.resampled(self.spec.grid).tokens)
        return torch.cat(maps, dim=-1)

    def finish(self, x: Tensor) -> FeatureMap:
        """The map, normed where the last stage is read alone and the settings say so."""
        alone = len(self.settings.stages) == 1
        return FeatureMap(self._normed(self.settings.stages[0], x) if alone else x, self.spec.grid)

    def load_weights(self, source: str) -> None:
        """Load a Swin model in transformers' names from a hub id or folder.

        Raises:
            CheckpointError: if a tensor is missing, left over or of another shape.

        """
        last = self.settings.stages[-1]
        behind = "|".join(str(stage) for stage in range(last + 1, 4)) or "none"
        unread = () if isinstance(self.tower.layernorm, nn.LayerNorm) else (r"layernorm\.",)
        load_safetensors(
            self.tower,
            source,
            files=("model.safetensors",),
            rename=_ours,
            unused=(*_AROUND, *unread, rf"encoder\.layers\.(({behind})\.|{last}\.downsample\.)"),
        )

    def _run(self, stage: int, place: int, x: Tensor) -> Tensor:
        """One block, after the map was halved where a stage begins."""
        layers: Any = self.tower.encoder.layers
        if stage and not place:
            x = layers[stage - 1].downsample(x, self._grid(stage - 1))
        return layers[stage].blocks[place](x, self._grid(stage))[0]

    def _normed(self, stage: int, x: Tensor) -> Tensor:
        return self.tower.layernorm(x) if stage == 3 else x

    def _grid(self, stage: int) -> Grid:
        side = _sides(self.settings)[stage]
        return side, side


class _PositionBias(nn.Module):
    """What each head adds for every pair of cells in a window: (1, heads, M, M).

    Takes the place of transformers' module, which keeps the pairs' numbers in a buffer that is not saved.
    """

    def __init__(self, settings: SwinSettings, heads: int) -> None:
        super().__init__()
        self.window, made_for = settings.window, settings.table_window or settings.window
        self.side = 2 * made_for - 1
        self.relative_position_bias_table = nn.Parameter(torch.zeros(self.side**2, heads))

    def forward(self) -> Tensor:
        """Look every pair's distance up in the table."""
        reach = 2 * self.window - 1
        table_NC = resampled_table(
            self.relative_position_bias_table, self.side, (reach, reach), antialias=False
        )
        steps = torch.arange(self.window, device=table_NC.device)
        rows, columns = steps.repeat_interleave(self.window), steps.repeat(self.window)
        down, across = (line[:, None] - line + self.window - 1 for line in (rows, columns))
        return table_NC[down * reach + across].permute(2, 0, 1)[None]


def _tower(settings: SwinSettings) -> SwinModel:
    """The whole model, so that ``drop_path`` grows over all its blocks, with tables that need no buffer."""
    tower = SwinModel(
        SwinConfig(
            image_size=settings.image_size,
            patch_size=settings.patch_size,
            embed_dim=settings.width,
            depths=list(settings.depths),
            num_heads=list(settings.heads),
            window_size=settings.window,
            mlp_ratio=settings.mlp_ratio,
            drop_path_rate=settings.drop_path,
        ),
        add_pooling_layer=False,
    )
    for module in tower.modules():
        if isinstance(module, SwinAttention):
            bias = _PositionBias(settings, module.num_attention_heads)
            module.set_submodule("relative_position_bias", bias)
    return tower


def _sides(settings: SwinSettings) -> list[int]:
    """Rows and columns of each stage's grid: an odd one is filled up before it is halved.

    Raises:
        PlanError: if the picture is no whole number of patches.

    """
    whole, left = divmod(settings.image_size, settings.patch_size)
    if left:
        near = " and ".join(str(n * settings.patch_size) for n in (whole, whole + 1) if n)
        raise PlanError(
            f"swin: image_size {settings.image_size} is no multiple of patch_size {settings.patch_size}; "
            f"take {near}"
        )
    sides = [whole]
    for _ in range(3):
        sides.append((sides[-1] + 1) // 2)
    return sides


# The classifier, masked training's decoder and token, and numbers of pairs that older files hold.
_AROUND = (
    r"classifier\.",
    r"decoder\.",
    r"embeddings\.mask_token$",
    r".*\.relative_position_index$",
)
_RENAMES = (
    ("attention.self.query.", "attention.q_proj."),
    ("attention.self.key.", "attention.k_proj."),
    ("attention.self.value.", "attention.v_proj."),
    ("attention.self.relative", "attention.relative_position_bias.relative"),
    ("attention.output.dense.", "attention.o_proj."),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
)


def _ours(name: str) -> str:
    name = name.removeprefix("swin.")
    for theirs, ours in _RENAMES:
        name = name.replace(theirs, ours)
    return name
