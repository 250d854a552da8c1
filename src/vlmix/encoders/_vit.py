"""Settings and arithmetic that the vision transformers share."""

from __future__ import annotations

from pydantic import PositiveInt

from vlmix.core.errors import PlanError
from vlmix.core.tensors import VisionSpec
from vlmix.encoders._pixels import ImageSettings


class VitSettings(ImageSettings):
    """Sizes of a vision transformer.

    ``layers`` counts the published model's blocks. ``feature_layer`` says which state is read, as in
    ``hidden_states``: 1 is after the first block, -1 after the last, -2 after the one before. Blocks behind
    it are not made.
    """

    patch_size: PositiveInt
    width: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    mlp: PositiveInt
    feature_layer: int = -1


def vit_blocks(settings: VitSettings) -> int:
    """How many blocks have to run for the chosen feature layer.

    Raises:
        PlanError: if there is no such layer.

    """
    layer, layers = settings.feature_layer, settings.layers
    blocks = layer if layer >= 0 else layers + 1 + layer
    if not 1 <= blocks <= layers:
        raise PlanError(
            f"{settings.kind}: feature_layer {layer} does not exist in {layers} layers; "
            f"it must be 1 to {layers}, or -1 to -{layers}"
        )
    return blocks


def vit_spec(settings: VitSettings) -> VisionSpec:
    """Grid, channels and blocks of a vision transformer without its prefix tokens.

    Raises:
        PlanError: if the picture is no whole number of patches, the heads do not share the width, or the
            feature layer does not exist.

    """
    if settings.image_size % settings.patch_size:
        whole = settings.image_size // settings.patch_size
        near = " and ".join(str(n * settings.patch_size) for n in (whole, whole + 1) if n)
        raise PlanError(
            f"{settings.kind}: image_size {settings.image_size} is no multiple of patch_size "
            f"{settings.patch_size}; take {near}"
        )
    if settings.width % settings.heads:
        raise PlanError(f"{settings.kind}: width {settings.width} is no multiple of heads {settings.heads}")
    side = settings.image_size // settings.patch_size
    return VisionSpec((side, side), settings.width, blocks=vit_blocks(settings))
