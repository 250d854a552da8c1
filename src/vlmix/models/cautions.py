"""What a model's settings allow though it is hardly meant: found by arithmetic, before any weight exists."""

from __future__ import annotations

from vlmix.core.interfaces import Router
from vlmix.core.parts import FUSIONS, ROUTERS
from vlmix.encoders._pixels import ImageSettings
from vlmix.models.configuration import VlmixConfig


def cautions(config: VlmixConfig) -> list[str]:
    """A sentence for each thing to look at twice.

    Raises:
        PlanError: if the parts cannot work together at all.

    """
    fusion = config.fusion_settings()
    own = FUSIONS.get(fusion.kind).warnings(fusion, config.plan().offered)
    return [*_enlarged(config), *own, *_without_bias(config)]


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


def _without_bias(config: VlmixConfig) -> list[str]:
    """Mixtures whose balance is to move biases that their routers do not have."""
    return [
        f"experts.{i}.balance.bias_rate: {mixture.router['kind']} has no bias, so nothing is moved. Take "
        "router: {kind: sigmoid}, or balance by `switch`"
        for i, mixture in enumerate(config.expert_settings())
        if mixture.balance.bias_rate and ROUTERS.get(mixture.router["kind"]).rebalance is Router.rebalance
    ]
