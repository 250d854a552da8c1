"""What a model's settings allow though it is hardly meant: found by arithmetic, before any weight exists."""

from __future__ import annotations

from vlmix.core.parts import FUSIONS
from vlmix.encoders._pixels import ImageSettings
from vlmix.models.configuration import VlmixConfig


def cautions(config: VlmixConfig) -> list[str]:
    """A sentence for each thing to look at twice.

    Raises:
        PlanError: if the parts cannot work together at all.

    """
    fusion = config.fusion_settings()
    return [*_enlarged(config), *FUSIONS.get(fusion.kind).warnings(fusion, config.plan().offered)]


def _enlarged(config: VlmixConfig) -> list[str]:
    """Encoders that read more pixels than the picture they are made from has."""
    if config.view_settings().kind != "whole":
        return []
    return [
        f"encoders.{i} ({settings.kind}) reads {settings.image_size} pixels a side, but pictures are made "
        f"{config.image_size}: they are enlarged and show no more. Set image_size to {settings.image_size}"
        for i, settings in enumerate(config.encoder_settings())
        if isinstance(settings, ImageSettings) and settings.image_size > config.image_size
    ]
