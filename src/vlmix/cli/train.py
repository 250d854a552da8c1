"""``vlmix train``: a recipe in, a model, its report and its curves out."""

from __future__ import annotations

from pathlib import Path

import typer

from vlmix.cli.console import out


def train(
    recipe: str = typer.Argument(help="A recipe file, or the name of one that `vlmix list recipes` shows."),
    overrides: list[str] = typer.Argument(
        None, help="Settings to change, as key.path=value: stages.0.steps=100 seed=1", show_default=False
    ),
    out_dir: Path = typer.Option(
        None, "--out", help="Run folder; runs/NAME if left out.", show_default=False
    ),
    resume: bool = typer.Option(False, "--resume", help="Continue the run in the folder where it stopped."),
) -> None:
    """Train a model through the stages of RECIPE, judge it, and write a report.

    The run folder then holds the model (an ordinary transformers folder), metrics, curves, the quarantine
    ledger and report/report.html. Ctrl-C stops after the current step; --resume goes on from there.
    """
    from vlmix.train.recipe_file import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    folder = out_dir or Path("runs") / loaded.name

    from vlmix.cli.flow import train_and_judge

    results = train_and_judge(loaded, folder, resume=resume)
    console = out()
    console.print(f"model   {folder / 'model'}")
    if results:
        console.print(f"report  {folder / 'report' / 'report.html'}")
