"""``vlmix plan``: what a recipe or model costs, before anything is made."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.table import Table

from vlmix.cli.console import out, show_warnings

if TYPE_CHECKING:
    from vlmix.models.plan import MixtureCost, ModelCost
    from vlmix.train.costs import StageCost

_ABREAST = 3  # stages in one table
_UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def plan(
    target: str = typer.Argument(help="A recipe (file or shipped name), a model folder or a run folder."),
    overrides: list[str] = typer.Argument(
        None, help="Recipe settings to change, as key.path=value.", show_default=False
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of tables."),
    images: int = typer.Option(1, "--images", min=0, help="Pictures in the prompt that is costed."),
    text_tokens: int = typer.Option(64, "--text-tokens", min=1, help="Tokens of text in that prompt."),
) -> None:
    """Count tokens, parameters, FLOPs and memory of TARGET, and the cost of each training stage.

    Nothing is built: no weight exists at any time, so a 7B model is planned in seconds on a laptop.
    """
    from vlmix.models.cautions import cautions
    from vlmix.models.loading import model_folder
    from vlmix.models.plan import plan_model

    stages: list[StageCost] = []
    if Path(target).is_dir():
        from vlmix.models.configuration import VlmixConfig

        name, config = target, VlmixConfig.from_pretrained(model_folder(target))
    else:
        from vlmix.train.build import recipe_config
        from vlmix.train.costs import stage_costs
        from vlmix.train.recipe_file import load_recipe

        recipe = load_recipe(target, overrides or [])
        name, config = recipe.name, recipe_config(recipe)
        stages = stage_costs(recipe, config, images=images, text_tokens=text_tokens)
    cost, warnings = plan_model(config, images=images, text_tokens=text_tokens), cautions(config)
    if as_json:
        more = {"stages": [asdict(s) for s in stages], "warnings": warnings}
        out().print_json(json.dumps({"name": name, **_as_dict(cost), **more}))
        return
    _show_model(name, cost)
    if stages:
        _show_stages(stages)
    show_warnings(out(), warnings)


def _as_dict(cost: ModelCost) -> dict[str, object]:
    return {
        **asdict(cost),
        "tokens_per_image": cost.vision.tokens,
        "prompt_tokens": cost.prompt_tokens,
        "parameters": cost.parameters,
        "prefill_flops": cost.prefill_flops,
        "weight_bytes": cost.weight_bytes,
        "cache_bytes": cost.cache_bytes,
    }


def _show_model(name: str, cost: ModelCost) -> None:
    parts = Table(title=f"{name}: what one picture costs", title_justify="left", box=None, padding=(0, 2))
    for column in ("part", "grid", "channels", "parameters", "FLOPs"):
        parts.add_column(column, justify="left" if column == "part" else "right")
    for part in cost.parts:
        spec = part.spec
        grid = f"{spec.grid[0]}x{spec.grid[1]}" if spec else ""
        channels = str(spec.channels) if spec else ""
        parts.add_row(part.name, grid, channels, quantity(part.parameters), quantity(part.flops))
    parts.add_row("[bold]total[/]", "", "", quantity(cost.parameters), quantity(cost.prefill_flops))
    out().print(parts)
    most = "at most " if cost.vision.varies else ""
    rows = {
        "views per picture": f"{most}{cost.vision.views}",
        "visual tokens per picture": f"{most}{cost.vision.tokens}",
        "prompt": f"{cost.prompt_tokens} tokens: {cost.images} x {cost.vision.tokens} visual "
        f"and {cost.text_tokens} of text",
        "parameters active": f"{quantity(cost.active)} of {quantity(cost.parameters)}",
        **{f"experts, {mixture.place}": _mixture(mixture) for mixture in cost.mixtures},
        "reading the prompt": f"{quantity(cost.prefill_flops)}FLOP",
        "each answer token": f"{quantity(cost.decode_flops)}FLOP",
        "weights": f"{memory(cost.weight_bytes)} at {cost.bytes_per_number} bytes a number",
        "key-value cache": f"{memory(cost.cache_bytes)} ({memory(cost.cache_bytes_per_token)} a token)",
        "activations, training": f"{memory(cost.activation_bytes)} a row, all trainable, no checkpointing",
    }
    facts = Table(box=None, padding=(0, 2), show_header=False)
    for label, value in rows.items():
        facts.add_row(label, value)
    out().print(facts)


def _mixture(mixture: MixtureCost) -> str:
    counts = " or ".join(map(str, sorted({*mixture.experts})))
    return f"{len(mixture.experts)} layers of {counts}, {mixture.chosen} for each token"


def _show_stages(stages: list[StageCost]) -> None:
    for first in range(0, len(stages), _ABREAST):
        out().print(_stage_table(stages[first : first + _ABREAST]))
    for stage in stages:
        for note in stage.notes:
            out().print(f"{stage.name}: {note}", markup=False, soft_wrap=True)


def _stage_table(stages: list[StageCost]) -> Table:
    table = Table(title="training stages", title_justify="left", box=None, padding=(0, 2))
    table.add_column()
    for stage in stages:
        table.add_column(stage.name, justify="right")
    absent = "data absent"
    rows: dict[str, Callable[[StageCost], str]] = {
        "steps": lambda s: absent if s.steps is None else str(s.steps),
        "samples": lambda s: absent if s.samples is None else str(s.samples),
        "visual tokens per picture": lambda s: str(s.visual_tokens),
        "trainable": lambda s: quantity(s.trainable),
        "forward and backward, a sample": lambda s: f"{quantity(s.flops_per_sample)}FLOP",
        "forward and backward, the stage": lambda s: (
            absent if s.flops is None else f"{quantity(s.flops)}FLOP"
        ),
        "weights": lambda s: memory(s.weight_bytes),
        "gradients": lambda s: memory(s.gradient_bytes),
        "optimizer": lambda s: memory(s.optimizer_bytes),
        "continual method": lambda s: memory(s.method_bytes),
        "activations, a micro-batch": lambda s: memory(s.activation_bytes),
    }
    if not any(stage.method_bytes for stage in stages):
        del rows["continual method"]
    for label, show in rows.items():
        table.add_row(label, *(show(stage) for stage in stages))
    return table


def quantity(value: float) -> str:
    """``7.06G`` for 7 060 000 000."""
    for size, unit in _UNITS:
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:g} "


def memory(size: float) -> str:
    """``1.5 GiB`` for 1 610 612 736 bytes."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            return f"{size:.3g} {unit}"
        size /= 1024
    raise AssertionError
