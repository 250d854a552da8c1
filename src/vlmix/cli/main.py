"""``vlmix``: one word for each thing to do with a recipe or a model.

Nothing here imports torch before a command needs it, so ``--help``, ``list`` and a typo answer at once.
"""

from __future__ import annotations

import errno
import sys

import typer

from vlmix import __version__
from vlmix.cli import (
    chat,
    compare,
    convert,
    data,
    demo,
    diagnose,
    doctor,
    evaluate,
    inspect,
    listing,
    score,
    search,
    train,
)
from vlmix.cli.console import fail
from vlmix.core.errors import DiskFullError, VlmixError

app = typer.Typer(
    name="vlmix",
    help="Build, train, judge and ask vision-language models with several encoders.\n\n"
    "Start with `vlmix demo`: five minutes, no download. Then `vlmix list recipes`, "
    "`vlmix plan RECIPE` and `vlmix train RECIPE`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("list")(listing.list_parts)
app.command("plan")(inspect.plan)
app.command("train")(train.train)
app.command("eval")(evaluate.evaluate)
app.command("score")(score.score)
app.command("compare")(compare.compare)
app.command("diagnose")(diagnose.diagnose)
app.command("chat")(chat.chat)
app.command("convert")(convert.convert)
app.add_typer(data.app, name="data")
app.command("search")(search.search)
app.command("demo")(demo.demo)
app.command("doctor")(doctor.doctor)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vlmix {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    pass


def main() -> None:
    """Run the command line; every error on purpose ends in one message and its own exit code."""
    try:
        app()
    except VlmixError as error:
        fail(str(error), error.exit_code)
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        fail("the disk is full. Free some space and run the same command again.", DiskFullError.exit_code)


if __name__ == "__main__":
    sys.exit(main())
