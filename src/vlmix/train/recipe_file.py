"""Recipes from files: ``base:`` derives one from another, ``key.path=value`` changes it. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vlmix.core.errors import RecipeError, UnknownNameError
from vlmix.core.files import write_text
from vlmix.core.parts import BENCHMARKS, ENCODERS, FUSIONS, PROJECTORS, SOURCES, VIEWS
from vlmix.core.registry import Registry
from vlmix.core.settings import read_settings
from vlmix.train.continual import CONTINUAL
from vlmix.train.optimizers import OPTIMIZERS
from vlmix.train.recipe import Recipe
from vlmix.train.transforms import TRANSFORMS
from vlmix.train.yaml_file import parse_yaml, read_yaml

SHIPPED = Path(__file__).resolve().parents[1] / "recipes"
GRIDS = "grids"


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with vlmix; files that start with ``_`` are only bases of others.

    Below ``grids`` are searches over recipes.
    """
    files = (path for path in SHIPPED.rglob("*.yaml") if not path.name.startswith("_"))
    files = (path for path in files if path.relative_to(SHIPPED).parts[0] != GRIDS)
    return sorted(path.relative_to(SHIPPED).with_suffix("").as_posix() for path in files)


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a YAML file, or a shipped one by name, with ``key.path=value`` changes.

    Raises:
        RecipeError: if something in it is wrong: names file, key, value, and the nearest known key.
        UnknownNameError: if there is no such recipe or part.

    """
    path = find_recipe(path_or_name, Path())
    raw = with_overrides(_with_base(path, ()), overrides)
    try:
        recipe = read_settings(Recipe, raw)
    except RecipeError as error:
        raise RecipeError(f"{path}:\n{error}") from None
    check_kinds(recipe)
    return recipe


def find_recipe(path_or_name: str | Path, folder: Path) -> Path:
    """The file of a recipe: a path, seen from ``folder``, or a shipped name.

    Raises:
        RecipeError: if there is no such file.
        UnknownNameError: if no shipped recipe has this name.

    """
    path = folder / path_or_name
    if path.is_file():
        return path
    shipped = SHIPPED / f"{path_or_name}.yaml"
    if str(path_or_name) in shipped_recipes():
        return shipped
    if path.suffix in {".yaml", ".yml"}:
        raise RecipeError(f"{path}: no such recipe file. Shipped by name: {', '.join(shipped_recipes())}")
    raise UnknownNameError("recipe", str(path_or_name), shipped_recipes())


def with_overrides(raw: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of ``raw`` with each ``key.path=value`` applied; values are YAML, list items go by number.

    A list item set to ``null`` is taken out of its list.

    Raises:
        RecipeError: if an override has no ``=``, or its path leads through something that has no keys.

    """
    result = dict(raw)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise RecipeError(
                f"{override!r}: an override is written key.path=value, such as stages.0.steps=10"
            )
        value = parse_yaml(text, f"override {path}")
        result = _set(result, path.split("."), value, path)
    return result


def check_kinds(recipe: Recipe) -> None:
    """Check every part's ``kind`` by its file's name, importing no part.

    Raises:
        RecipeError: if a part has no ``kind``.
        UnknownNameError: if no part is called so; names the nearest one.

    """
    for where, registry, raw in parts_of(recipe):
        if "kind" not in raw:
            raise RecipeError(f"{where}: `kind` is required, one of: {', '.join(registry.names())}")
        if raw["kind"] not in registry.names():
            raise RecipeError(
                f"{where}: {UnknownNameError(registry.word, str(raw['kind']), registry.names())}"
            )


def parts_of(recipe: Recipe) -> Iterator[tuple[str, Registry[Any], dict[str, Any]]]:
    """Each part that the recipe names: where it stands, its registry, and its raw settings."""
    model = recipe.model
    for index, encoder in enumerate(model.encoders):
        yield f"model.encoders.{index}", ENCODERS, {k: v for k, v in encoder.items() if k != "weights"}
    yield "model.views", VIEWS, model.views
    yield "model.fusion", FUSIONS, model.fusion
    yield "model.projector", PROJECTORS, model.projector
    for s, stage in enumerate(recipe.stages):
        for d, data in enumerate(stage.data):
            yield f"stages.{s}.data.{d}.source", SOURCES, data.source
        yield f"stages.{s}.optimizer", OPTIMIZERS, stage.optimizer
        if stage.solo is not None:
            yield f"stages.{s}.solo.projector", PROJECTORS, stage.solo.projector
        for b, transform in enumerate(stage.before):
            yield f"stages.{s}.before.{b}", TRANSFORMS, transform
    if recipe.continual is not None:
        yield "continual", CONTINUAL, recipe.continual
    for e, judged in enumerate(recipe.evals):
        yield f"evals.{e}.benchmark", BENCHMARKS, judged.benchmark


def write_recipe(path: Path, recipe: Recipe) -> None:
    """Write the recipe as it was understood, every default filled in; keys keep their order, which counts."""
    write_text(path, yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def differences(old: Recipe, new: Recipe) -> list[str]:
    """``key: old -> new`` for everything that decides weights and in which two recipes differ."""
    flat_old, flat_new = dict(_flat(_deciding(old))), dict(_flat(_deciding(new)))
    keys = [*flat_old, *(key for key in flat_new if key not in flat_old)]
    pairs = [(key, flat_old.get(key, "absent"), flat_new.get(key, "absent")) for key in keys]
    return [f"{key}: {before} -> {after}" for key, before, after in pairs if before != after]


def _deciding(recipe: Recipe) -> dict[str, Any]:
    """The recipe without what no weight depends on, which may change when a run is resumed."""
    free = {
        "name": True,
        "paper": True,
        "fidelity": True,
        "evals": True,
        "parallel": True,
        "feature_cache": True,
    }
    told = {"name": True, "rows": True, "get": True}
    when = {"workers": True, "save_every_steps": True, "publish": True, "cache_features": True}
    when |= {"tell_samples": True}
    # What messages of stopped runs advise to change.
    ways_out = {"gradient_checkpointing": True, "worker_timeout": True, "max_bad": True}
    return recipe.model_dump(
        mode="json",
        exclude={
            **free,
            "stages": {"__all__": {**when, **ways_out, "data": {"__all__": told}}},
        },
    )


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    items = dict(enumerate(value)) if isinstance(value, list) else value
    if isinstance(items, dict) and items:
        for key, inner in items.items():
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
        if isinstance(value, dict) and path.endswith(".train"):
            yield f"{path} (order)", ", ".join(value)
    else:
        yield path, repr(value)


def _with_base(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """The file's mapping laid over its base's, and so on down."""
    path = path.resolve()
    if path in above:
        chain = " -> ".join(str(p) for p in (*above[above.index(path) :], path))
        raise RecipeError(f"{path}: `base` leads back to itself: {chain}")
    raw = read_yaml(path)
    base = raw.pop("base", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise RecipeError(f"{path}: `base` is the path or name of a recipe, not {base!r}")
    below = _with_base(find_recipe(base, path.parent), (*above, path))
    try:
        return _merged(below, raw)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None


def _merged(base: Mapping[str, Any], over: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Mappings are merged key by key, values and lists replaced; a mapping over a list changes its items."""
    result = dict(base)
    for key, value in over.items():
        old, place = result.get(key), f"{where}{key}"
        if isinstance(old, dict) and isinstance(value, dict):
            result[key] = _merged(old, value, f"{place}.")
        elif isinstance(old, list) and isinstance(value, dict):
            result[key] = _with_items(old, value, place)
        else:
            result[key] = value
    return result


def _with_items(base: Sequence[Any], over: Mapping[str | int, Any], where: str) -> list[Any]:
    """The list with items changed by their ``name`` or place, or taken out by ``null``."""
    named = {item.get("name", i) if isinstance(item, dict) else i: i for i, item in enumerate(base)}
    items = dict(enumerate(base))
    for key, value in over.items():
        place = named.get(key, key)
        if place not in items:
            known = ", ".join(map(str, named))
            raise RecipeError(f"{where}.{key}: the base has no such item, only {known}")
        old = items[place]
        both = isinstance(old, dict) and isinstance(value, dict)
        items[place] = _merged(old, value, f"{where}.{key}.") if both else value
    return [item for item in items.values() if item is not None]


def _set(target: Any, path: Sequence[str], value: Any, whole: str) -> Any:
    """A copy of ``target`` in which the place that ``path`` leads to holds ``value``."""
    if not path:
        return value
    key, rest = path[0], path[1:]
    if isinstance(target, list):
        if not key.isdecimal() or int(key) >= len(target):
            raise RecipeError(f"{whole}: {key!r} is not a place in a list of {len(target)} (counted from 0)")
        if value is None and not rest:
            return [v for i, v in enumerate(target) if i != int(key)]
        return [_set(v, rest, value, whole) if i == int(key) else v for i, v in enumerate(target)]
    if not isinstance(target, dict):
        raise RecipeError(f"{whole}: there is nothing under {target!r} to set {key!r} in")
    # A path may go where the file is silent: whether the key exists at all is for the schema to say.
    inner = target.get(key, {} if rest else None)
    return {**target, key: _set(inner, rest, value, whole)}
