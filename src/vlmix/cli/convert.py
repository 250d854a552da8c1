"""``vlmix convert``: a published checkpoint folder becomes a vlmix model folder, and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import typer
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from vlmix.cli.console import err, out
from vlmix.core.errors import InputError

if TYPE_CHECKING:
    from vlmix.convert._compose import Beside
    from vlmix.core.progress import Told


_SOURCE = typer.Argument(
    help="A published checkpoint's folder; a vlmix model's with --to, --drop-encoder or --merge-adapters."
)
_TARGET = typer.Argument(help="The folder to write; it must not exist yet.")
_TO = typer.Option(None, "--to", help="Write this family's published layout instead.", metavar="FAMILY")
_TOKENIZER = typer.Option(None, "--tokenizer", help="A folder with a tokenizer, if SOURCE has none.")
_LANGUAGE = typer.Option(
    None,
    "--language-model",
    help="The decoder's folder, where SOURCE holds only what a first stage trained (mm_projector.bin).",
)
_BASE = typer.Option(
    None, "--base", help="The folder of the model that adapters (LoRA) in SOURCE change; they are merged."
)
_TOWERS = typer.Option(
    [],
    "--tower",
    help="An encoder's folder under the name that SOURCE's config.json has for it.",
    metavar="NAME=DIR",
)
_DROP = typer.Option(
    None, "--drop-encoder", help="Write the vlmix model without its encoder N, counted from 0.", metavar="N"
)
_MERGE = typer.Option(
    False,
    "--merge-adapters",
    help="Write the vlmix model with its low-rank adapters merged into its weights.",
)
_SET = typer.Option([], "--set", help="A setting that shapes do not show, such as encoders.0.heads=12.")


def convert(  # noqa: PLR0913, PLR0917 - each is an option of the command
    source: Path = _SOURCE,
    target: Path = _TARGET,
    to: str = _TO,
    tokenizer: Path = _TOKENIZER,
    language_model: Path = _LANGUAGE,
    base: Path = _BASE,
    towers: list[str] = _TOWERS,
    drop_encoder: int = _DROP,
    merge_adapters: bool = _MERGE,
    settings: list[str] = _SET,
) -> None:
    """Read SOURCE, account for every tensor, and write TARGET. Nothing is downloaded.

    The family is recognised from architecture, tensor names and shapes, never from folder names; `vlmix list
    families` shows all. A tensor that fits nowhere stops the conversion; one that is known to be of no use
    here is kept aside for the way back.

    * `vlmix convert llava-v1.5-7b models/llava` reads a published folder

    * `vlmix convert models/llava back --to llava` writes it as its authors' code reads it

    * `vlmix convert pretrain models/x --language-model vicuna-7b` completes a first stage's projector

    * `vlmix convert lora models/x --base vicuna-7b` merges adapters into the model they change

    * `vlmix convert eagle models/x --tower clip-448=clip` says where an encoder lies

    * `vlmix convert models/eagle small --drop-encoder 2` leaves an encoder out

    * `vlmix convert models/tuned plain --merge-adapters` makes adapters a part of the weights
    """
    reading = {
        "--tokenizer": tokenizer,
        "--language-model": language_model,
        "--base": base,
        "--tower": towers,
        "--set": settings,
    }
    changing = {"--to": to, "--drop-encoder": drop_encoder, "--merge-adapters": merge_adapters or None}
    chosen = [name for name, value in changing.items() if value is not None]
    with _Bars() as told:
        if chosen:
            others = {name: value for name, value in changing.items() if name != chosen[0]}
            _refuse(chosen[0], {**reading, **others})
            done = _changed(source, target, to, drop_encoder, told)
        else:
            from vlmix.convert._compose import Beside

            beside = Beside(language_model, base, _named(towers))
            done = _converted(source, target, tokenizer, settings, beside, told)
    for line in done:
        out().print(line)


def _changed(source: Path, target: Path, to: str | None, encoder: int | None, told: Told) -> list[str]:
    """Write a vlmix model otherwise: in a family's layout, without an encoder, or without adapters."""
    if to is not None:
        from vlmix.convert.export import export

        return [f"{export(source, target, to, told)} tensors written as {to}: {target}"]
    if encoder is not None:
        from vlmix.convert.drop import drop_encoder

        channels = drop_encoder(source, target, encoder, told)
        return [f"encoder {encoder} left out with its {channels} channels", f"model   {target}"]
    from vlmix.convert.merge import merge

    return [f"{merge(source, target)} adapted layers merged into their weights", f"model   {target}"]


class _Bars:
    """A bar with the time left for each thing done, where somebody watches; nothing where nobody does.

    That a pickle is read is said in any case.
    """

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self._console = err()
        self._bars = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._rows: dict[str, TaskID] = {}

    def __enter__(self) -> _Bars:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self._rows:
            self._rows[what] = self._bars.add_task(what, total=total)
            if "pickle" in what and not self._console.is_terminal:
                self._console.print(what, soft_wrap=True)
        self._bars.update(self._rows[what], completed=done)


def _converted(
    source: Path, target: Path, tokenizer: Path | None, settings: Sequence[str], beside: Beside, told: Told
) -> list[str]:
    from vlmix.convert.run import convert as run
    from vlmix.train.recipe_file import with_overrides

    done = run(source, target, tokenizer, lambda raw: with_overrides(raw, settings), beside, told)
    reasons = [*done.kept.values()]
    said = [
        f"{done.family}: {done.moved} tensors moved, {len(reasons)} kept aside for the way back",
        *(f"  {reasons.count(reason)} {reason}" for reason in sorted({*reasons})),
    ]
    if not done.processor:
        said.append(
            "[yellow]no tokenizer there: give one with --tokenizer DIR to be able to chat and train[/]"
        )
    return [*said, f"model   {target}"]


def _named(towers: Sequence[str]) -> dict[str, Path]:
    pairs = [tower.partition("=") for tower in towers]
    for name, sign, folder in pairs:
        if not (name and sign and folder):
            raise InputError(
                f"--tower {name}: must be NAME=DIR, such as openai/clip-vit-large-patch14-336=clip"
            )
    return {name: Path(folder) for name, _, folder in pairs}


def _refuse(option: str, others: dict[str, object]) -> None:
    """Say that options do not go together, rather than pass over some of them."""
    given = [name for name, value in others.items() if value not in (None, [])]
    if given:
        raise InputError(f"{option} takes a vlmix model as it is: {', '.join(given)} cannot go with it")
