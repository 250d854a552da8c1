"""A choice of a search -> the recipe of its trial, fully resolved, and the digest that names it. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vlmix.core.errors import RecipeError
from vlmix.core.settings import read_settings
from vlmix.search.points import Point
from vlmix.search.settings import Grid, Raw, StartSettings
from vlmix.train.recipe import Recipe
from vlmix.train.recipe_file import check_kinds, load_recipe, with_overrides

SHARED, ALIGNED, FEATURES, START, WORDS = "shared", "aligned", "features", "start", "words"
CHECKS = "checks"
_ENCODER: Final = "encoder."
_ANYWHERE: Final = Path(SHARED)
_KEY_LENGTH: Final = 16
# What changes no result: words for people, and where things are kept.
_FREE: Final = {"name": True, "paper": True, "fidelity": True, "results": True, "feature_cache": True}


@dataclass(frozen=True, slots=True)
class Composer:
    """A grid with its base recipe, and the recipe of what all trials begin with, if there is one."""

    grid: Grid
    base: Recipe
    begin: Recipe | None = None
    begin_key: str = ""

    @staticmethod
    def of(grid: Grid) -> Composer:
        """Read the base recipe.

        Raises:
            RecipeError: if it cannot be read, or names no benchmark, or the start does not fit it.

        """
        base = load_recipe(grid.recipe)
        if not base.evals:
            raise RecipeError(f"{grid.recipe}: a search needs a benchmark to judge by; add `evals`")
        if grid.start is None:
            return Composer(grid, base)
        begin = _start(grid, base, grid.start)
        return Composer(grid, base, begin, _digest(begin))

    def recipe(self, point: Point, seed: int, shared: Path) -> Recipe:
        """The recipe of one trial; what trials have in common is below ``shared``.

        Raises:
            RecipeError: if the choice does not fit the base recipe.

        """
        raw = self.base.model_dump(mode="json")
        if point.encoders:
            raw["model"]["encoders"] = [dict(self.grid.encoders[name]) for name in point.encoders]
        raw = with_overrides(raw, [f"{key}={value}" for key, value in point.settings])
        raw |= {"name": f"{self.grid.name}: {point.label}", "seed": seed, "results": str(shared / ALIGNED)}
        raw["feature_cache"] = {**raw["feature_cache"], "folder": str(shared / FEATURES)}
        raw["stages"] = self._stages(raw["stages"], point, shared)
        if self.grid.start is not None:
            words = {"weights": str(self._start_folder(shared) / WORDS)}
            raw["model"] |= {"language_model": words, "tokenizer": words}
        return _read(raw, f"trial {point.label}")

    def start(self, shared: Path) -> tuple[Recipe, Path] | None:
        """The recipe of what all trials begin with, and its run folder; ``None`` where there is none."""
        return None if self.begin is None else (self.begin, self._start_folder(shared))

    def key(self, point: Point, seed: int) -> str:
        """A digest of the resolved recipe, the same wherever the search is kept."""
        return _digest(self.recipe(point, seed, _ANYWHERE))

    def aligned(self, point: Point) -> frozenset[str]:
        """The encoders of a choice that are aligned alone first."""
        align = self.grid.align
        return frozenset() if align is None else frozenset(point.encoders) - {*align.skip}

    def _start_folder(self, shared: Path) -> Path:
        return shared / START / self.begin_key

    def _stages(self, stages: list[Raw], point: Point, shared: Path) -> list[Raw]:
        """Each encoder alone, then the recipe's own stages; encoders are loaded where they are first used."""
        aligned = self.aligned(point)
        alone = [
            self._align(name, number, self._loads(number, name, shared))
            for number, name in enumerate(point.encoders)
            if name in aligned
        ]
        first, *rest = stages
        loads = [
            load
            for number, name in enumerate(point.encoders)
            if name not in aligned
            for load in self._loads(number, name, shared)
        ]
        return [*alone, {**first, "before": [*loads, *(first.get("before") or [])]}, *rest]

    def _loads(self, number: int, name: str, shared: Path) -> list[Raw]:
        if self.grid.start is None:
            return []
        place = list(self.grid.encoders).index(name)
        folder = str(self._start_folder(shared))
        return [{"kind": "load_encoder", "encoder": number, "weights": folder, "from": place}]

    def _align(self, name: str, number: int, loads: list[Raw]) -> Raw:
        raw = {} if self.grid.align is None else dict(self.grid.align.stage)
        for key in ("train", "layer_decay"):
            if isinstance(raw.get(key), dict):
                raw[key] = _numbered(raw[key], number)
        before = [*loads, *(raw.get("before") or [])]
        return {**raw, "name": f"align_{name}", "solo": {**raw["solo"], "encoder": number}, "before": before}


def _start(grid: Grid, base: Recipe, start: StartSettings) -> Recipe:
    raw = base.model_dump(mode="json")
    raw["model"]["encoders"] = [dict(encoder) for encoder in grid.encoders.values()]
    raw |= {"name": f"{grid.name}: start", "seed": start.seed, "evals": [], "results": None}
    raw["stages"] = start.stages
    raw = with_overrides(raw, [f"{key}={json.dumps(value)}" for key, value in start.settings.items()])
    return _read(raw, "start")


def _numbered(globs: Mapping[str, Any], number: int) -> dict[str, Any]:
    """``encoder.*`` -> ``encoders.3.*``."""
    place = f"encoders.{number}."
    return {
        place + glob.removeprefix(_ENCODER) if glob.startswith(_ENCODER) else glob: value
        for glob, value in globs.items()
    }


def _read(raw: Mapping[str, Any], where: str) -> Recipe:
    try:
        recipe = read_settings(Recipe, raw)
        check_kinds(recipe)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    return recipe


def _digest(recipe: Recipe) -> str:
    deciding = recipe.model_dump(mode="json", exclude=dict(_FREE))
    return hashlib.sha256(json.dumps(deciding).encode()).hexdigest()[:_KEY_LENGTH]
