"""Grid files: read from a path or by the name of a shipped one, with ``key.path=value`` changes. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlmix.core.errors import RecipeError, UnknownNameError
from vlmix.core.settings import read_settings
from vlmix.search.settings import Grid
from vlmix.train.recipe_file import GRIDS, SHIPPED, find_recipe, with_overrides
from vlmix.train.yaml_file import read_yaml

_FOLDER = SHIPPED / GRIDS


def shipped_grids() -> list[str]:
    """Names of the grids that come with vlmix; files that start with ``_`` are recipes they begin from."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml") if not path.name.startswith("_"))


def load_grid(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Grid:
    """Read a grid; its ``recipe`` becomes a path that holds from everywhere.

    Raises:
        RecipeError: if something in it is wrong: names file, key, value, and the nearest known key.
        UnknownNameError: if there is no such grid or recipe.

    """
    path = find_grid(path_or_name)
    raw = with_overrides(read_yaml(path), overrides)
    try:
        grid = read_settings(Grid, raw)
        recipe = find_recipe(grid.recipe, path.parent)
    except RecipeError as error:
        raise RecipeError(f"{path}:\n{error}") from None
    return grid.model_copy(update={"recipe": str(recipe.resolve())})


def find_grid(path_or_name: str | Path) -> Path:
    """The file of a grid: a path, or a shipped name.

    Raises:
        RecipeError: if there is no such file.
        UnknownNameError: if no shipped grid has this name.

    """
    path = Path(path_or_name)
    if path.is_file():
        return path
    if str(path_or_name) in shipped_grids():
        return _FOLDER / f"{path_or_name}.yaml"
    if path.suffix in {".yaml", ".yml"}:
        raise RecipeError(f"{path}: no such grid file. Shipped by name: {', '.join(shipped_grids())}")
    raise UnknownNameError("grid", str(path_or_name), shipped_grids())
