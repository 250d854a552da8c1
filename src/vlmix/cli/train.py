"""``vlmix train``: a recipe in, a model, its report and its curves out."""

from __future__ import annotations

from pathlib import Path

import typer

from vlmix.cli.console import err, out, process_number, show_warnings


def train(
    recipe: str = typer.Argument(help="A recipe file, or the name of one that `vlmix list recipes` shows."),
    overrides: list[str] = typer.Argument(
        None, help="Settings to change, as key.path=value: stages.0.steps=100 seed=1", show_default=False
    ),
    out_dir: Path = typer.Option(
        None, "--out", help="Run folder; runs/NAME if left out.", show_default=False
    ),
    resume: bool = typer.Option(False, "--resume", help="Continue the run in the folder where it stopped."),
    tiny: bool = typer.Option(
        False,
        "--tiny",
        help="A dress rehearsal: every part at toy size, two steps a stage, no weights and no data needed.",
    ),
    features: Path = typer.Option(
        None,
        "--features",
        help="Folder for the outputs of frozen encoders, shared with other runs; the run's own if left out.",
        show_default=False,
    ),
    no_features: bool = typer.Option(
        False, "--no-features", help="Store none: encoders run in every step, with the same results."
    ),
) -> None:
    """Train a model through the stages of RECIPE, judge it, and write a report.

    A stage trains what its globs name: parts of the model, low-rank adapters on them (`model.adapters`), or
    one encoder alone with a projector of its own (`solo`).

    The run folder then holds the model (an ordinary transformers folder), metrics, curves, the quarantine
    ledger and report/report.html. Ctrl-C stops after the current step; --resume goes on from there.
    """
    from vlmix.train.recipe_file import load_recipe

    kept = [f"feature_cache.folder={features}"] if features else []
    kept += ["feature_cache.use=false"] if no_features else []
    loaded = load_recipe(recipe, [*(overrides or []), *kept])
    folder = out_dir or Path("runs") / (f"{loaded.name}_tiny" if tiny else loaded.name)
    if tiny:
        from vlmix.train.build import check_parts
        from vlmix.train.tiny import shrunk

        check_parts(loaded)
        err().print(
            f"a dress rehearsal of {loaded.name}: every code path of this recipe, none of its quality"
        )
        number = process_number()  # each writes its own, the same everywhere
        loaded = shrunk(loaded, folder.with_name(f"{folder.name}_data{number or ''}"))

    from vlmix.cli.flow import train_and_judge
    from vlmix.models.cautions import cautions
    from vlmix.train.build import check_parts, recipe_config

    check_parts(loaded)
    show_warnings(err(), cautions(recipe_config(loaded)))
    results = train_and_judge(loaded, folder, resume=resume)
    console = out()
    console.print(f"model   {folder / 'model'}")
    if results:
        console.print(f"report  {folder / 'report' / 'report.html'}")
