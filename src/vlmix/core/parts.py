"""The registries, one for each kind of part; making them imports no part and no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlmix.core.errors import RecipeError
from vlmix.core.registry import Registry
from vlmix.core.settings import PartSettings, read_settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vlmix.core.interfaces import Benchmark, Fusion, Projector, Router, Source, VisionEncoder
    from vlmix.core.scoring import Scorer
    from vlmix.core.views import Views

ENCODERS: Registry[VisionEncoder] = Registry("vlmix.encoders", "encoder")
VIEWS: Registry[Views] = Registry("vlmix.views", "views")
FUSIONS: Registry[Fusion] = Registry("vlmix.fusion", "fusion")
PROJECTORS: Registry[Projector] = Registry("vlmix.projectors", "projector")
ROUTERS: Registry[Router] = Registry("vlmix.moe.routers", "router")
SOURCES: Registry[Source] = Registry("vlmix.data.sources", "data source")
BENCHMARKS: Registry[Benchmark] = Registry("vlmix.evals.benchmarks", "benchmark")
SCORERS: Registry[Scorer] = Registry("vlmix.evals.scoring", "benchmark with a scoring rule")


def read_part(registry: Registry[Any], raw: Mapping[str, Any], where: str = "") -> PartSettings:
    """``{"kind": "clip", …}`` -> that part's settings.

    Raises:
        UnknownNameError: if no part has this ``kind``.
        RecipeError: if ``kind`` is absent or a key does not fit.

    """
    if "kind" not in raw:
        known = ", ".join(registry.names())
        raise RecipeError(f"{where or registry.word}: `kind` is required, one of: {known}")
    return read_settings(registry.get(raw["kind"]).settings_class, raw, where or raw["kind"])
