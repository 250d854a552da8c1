"""Which benchmarks a command asks for: those named, as the run's recipe has them, changed by its options."""

from __future__ import annotations

from pathlib import Path

from vlmix.cli.console import err
from vlmix.core.errors import InputError
from vlmix.core.parts import BENCHMARKS

RECIPE = "recipe.yaml"


def wanted(model: Path | None, names: list[str]) -> list[tuple[dict[str, object], int | None]]:
    """Raw settings and limit of every benchmark that is asked for, as the recipe of the run has them.

    Raises:
        InputError: if none is named and MODEL is no run whose recipe names one.
        UnknownNameError: if there is no such benchmark.

    """
    for name in names:
        if name not in BENCHMARKS.names():
            BENCHMARKS.get(name)
    recipe = None if model is None else model / RECIPE
    judged = of_recipe(recipe) if recipe is not None and recipe.is_file() else []
    if not (names or judged):
        raise InputError(
            f"{model or 'eval'}: no benchmark is named, and there is no run whose recipe names one under "
            f"`evals`. Give --benchmark, one of: {', '.join(BENCHMARKS.names())}"
        )
    found: list[tuple[dict[str, object], int | None]] = []
    for name in names or dict.fromkeys(str(raw["kind"]) for raw, _ in judged):
        own = [(raw, limit) for raw, limit in judged if raw["kind"] == name]
        for raw, limit in own:
            told = [f"{key}={value}" for key, value in raw.items() if key != "kind"]
            most = [] if limit is None else [f"--limit {limit}"]
            words = " ".join([name, *told, *most])
            err().print(f"as in {recipe}: {words}", markup=False, soft_wrap=True)
        found += own or [({"kind": name}, None)]
    return found


def of_recipe(path: Path) -> list[tuple[dict[str, object], int | None]]:
    """The benchmarks of a recipe with their limits; nothing else of it is looked at."""
    from vlmix.core.settings import read_settings
    from vlmix.train.recipe import EvalSettings
    from vlmix.train.yaml_file import read_yaml

    raws = read_yaml(path).get("evals") or []
    judged = [read_settings(EvalSettings, raw, f"{path}: evals.{index}") for index, raw in enumerate(raws)]
    return [(dict(each.benchmark), each.limit) for each in judged]


def changed(raw: dict[str, object], data: Path | None, settings: list[str]) -> dict[str, object]:
    """A benchmark's raw settings with what ``--data`` and ``--set`` say.

    Raises:
        InputError: if there is no such folder, or a setting is not ``key=value``.

    """
    from vlmix.train.recipe_file import with_overrides

    if data is not None:
        if not data.exists():
            raise InputError(f"--data {data}: no such folder")
        raw = {**raw, "path": str(data)}
    return with_overrides(raw, settings)
