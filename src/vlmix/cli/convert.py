"""``vlmix convert``: a published checkpoint folder becomes a vlmix model folder, and back."""

from __future__ import annotations

from pathlib import Path

import typer

from vlmix.cli.console import out


def convert(
    source: Path = typer.Argument(help="A published checkpoint's folder; with --to, a vlmix model folder."),
    target: Path = typer.Argument(help="The folder to write; it must not exist yet."),
    to: str = typer.Option(
        None, "--to", help="Write this family's published layout instead.", metavar="FAMILY"
    ),
    tokenizer: Path = typer.Option(
        None, "--tokenizer", help="A folder with a tokenizer, if SOURCE has none."
    ),
    settings: list[str] = typer.Option(
        [], "--set", help="A setting that shapes do not show, such as encoders.0.heads=12."
    ),
) -> None:
    """Read SOURCE, account for every tensor, and write TARGET.

    The family is recognised from architecture, tensor names and shapes, never from folder names. A tensor
    that fits nowhere stops the conversion; one that is known to be of no use here is kept aside for the way
    back.
    """
    if to is not None:
        from vlmix.convert.export import export

        out().print(f"{export(source, target, to)} tensors written as {to}: {target}")
        return
    from vlmix.convert.run import convert as run
    from vlmix.train.recipe_file import with_overrides

    done = run(source, target, tokenizer, change=lambda raw: with_overrides(raw, settings))
    out().print(f"{done.family}: {done.moved} tensors moved, {len(done.kept)} kept aside for the way back")
    for reason in sorted({*done.kept.values()}):
        out().print(f"  {sum(why == reason for why in done.kept.values())} {reason}")
    if not done.processor:
        out().print(
            "[yellow]no tokenizer there: give one with --tokenizer DIR to be able to chat and train[/]"
        )
    out().print(f"model   {target}")
