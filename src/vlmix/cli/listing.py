"""``vlmix list``: what there is to build with."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.table import Table

from vlmix.cli.console import out
from vlmix.convert.registry import FAMILIES
from vlmix.core.errors import UnknownNameError
from vlmix.core.parts import BENCHMARKS, ENCODERS, FUSIONS, PROJECTORS, ROUTERS, SCORERS, SOURCES, VIEWS
from vlmix.evals.diagnostics import DIAGNOSTICS
from vlmix.search.grid_file import find_grid, shipped_grids
from vlmix.search.strategies import STRATEGIES
from vlmix.train.continual import CONTINUAL
from vlmix.train.optimizers import OPTIMIZERS
from vlmix.train.recipe_file import find_recipe, shipped_recipes

_REGISTRIES = {
    "encoders": ENCODERS,
    "views": VIEWS,
    "fusion": FUSIONS,
    "projectors": PROJECTORS,
    "routers": ROUTERS,
    "sources": SOURCES,
    "benchmarks": BENCHMARKS,
    "scorers": SCORERS,
    "diagnostics": DIAGNOSTICS,
    "optimizers": OPTIMIZERS,
    "continual": CONTINUAL,
    "families": FAMILIES,
    "strategies": STRATEGIES,
}


def list_parts(
    what: str = typer.Argument(
        "",
        help="encoders, views, fusion, projectors, routers, sources, benchmarks, scorers, "
        "diagnostics, optimizers, continual, families, recipes; all if left out.",
    ),
) -> None:
    """List the parts, data sources, benchmarks and recipes that vlmix ships or finds in plugins.

    Families are the published checkpoints that `vlmix convert` reads and writes; strategies and grids are for
    `vlmix search`.
    """
    kinds = [*_REGISTRIES, "recipes", "grids"]
    if what and what not in kinds:
        raise UnknownNameError("list", what, kinds)
    for kind in [what] if what else kinds:
        table = Table(
            title=kind, title_justify="left", title_style="bold", box=None, padding=(0, 2), show_header=False
        )
        table.add_column(style="cyan", no_wrap=True)
        table.add_column()
        for name, summary in _rows(kind):
            table.add_row(name, summary)
        out().print(table)
        out().print()


def _rows(kind: str) -> list[tuple[str, str]]:
    if kind == "recipes":
        return [(name, _first_comment(find_recipe(name, Path()))) for name in shipped_recipes()]
    if kind == "grids":
        return [(name, _first_comment(find_grid(name))) for name in shipped_grids()]
    registry = _REGISTRIES[kind]
    if kind == "scorers":
        return [(name, f"{registry.summary(name)} {_protocols(name)}") for name in registry.names()]
    return [(name, registry.summary(name)) for name in registry.names()]


def _protocols(name: str) -> str:
    """The rules of a scorer; the first is the one that `vlmix score` takes unasked."""
    return f"Protocols: {', '.join(SCORERS.get(name).protocols)}."


def _first_comment(recipe: Path) -> str:
    first = recipe.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""
