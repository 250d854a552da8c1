"""``vlmix data``: look at a data set, check it before a GPU is touched, pack it into shards."""

from __future__ import annotations

import re
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from vlmix.cli.console import err, out
from vlmix.core.errors import InputError

if TYPE_CHECKING:
    from vlmix.core.interfaces import Source

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Look at a data set, check it before a GPU is touched, and pack it into tar shards.\n\n"
    "PATH is a LLaVA JSON or JSONL file, a folder (or pattern) of tar shards as webdataset has them, or "
    "tables of Hugging Face datasets: save_to_disk, parquet, arrow. `check` also takes a recipe.\n\n"
    "* `vlmix data show mine/rows.json` shows the first rows with their pictures\n\n"
    "* `vlmix data check mine/rows.json --tokenizer runs/demo` finds rows that cannot be used, and why\n\n"
    "* `vlmix data check my_recipe.yaml` checks every set of a recipe with its own tokens and max_length\n\n"
    "* `vlmix data pack mine/rows.json shards` writes shards; train from them with "
    "`{kind: webdataset, shards: shards}`",
)
_LINE_EVERY_SECONDS = 10.0
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
_PATH = typer.Argument(help="A JSON file, tars, tables; see `vlmix data --help`.", show_default=False)
_IMAGES = typer.Option(None, "--images", help="The folder of pictures, where it is not beside PATH.")
_SET = typer.Option(
    [], "--set", help="A setting of the source as key=value, such as split=test or question=prompt."
)
_WORKERS = typer.Option(0, "--workers", min=0, help="Processes that read and decode; 0: this one alone.")


@app.command("check")
def check(  # noqa: PLR0913, PLR0917 - each is an option of the command
    path: str = typer.Argument(help="A JSON file, tars, tables, or a recipe.", show_default=False),
    images: Path = _IMAGES,
    tokenizer: str = typer.Option(
        None, "--tokenizer", help="Count its tokens (a folder or hub id) rather than words."
    ),
    max_length: int = typer.Option(
        None, "--max-length", min=1, help="With --tokenizer: rows with more tokens are bad."
    ),
    visual_tokens: int = typer.Option(
        0, "--visual-tokens", min=0, help="With --tokenizer: tokens of one picture; `vlmix plan` says."
    ),
    out_dir: Path = typer.Option(None, "--out", help="Report folder; runs/data_check/NAME if left out."),
    max_bad: float = typer.Option(0.01, "--max-bad", min=0, max=1, help="Share of bad rows that is borne."),
    workers: int = _WORKERS,
    settings: list[str] = _SET,
) -> None:
    """Read every row of PATH, decode every picture, measure every conversation, and say what is wrong.

    Found: pictures that are missing or corrupt, pictures and `<image>` that differ in number, rows longer
    than max_length, malformed rows; and, without calling a row bad for it, ids and pictures that repeat.

    The report folder holds report.json, lengths.png (how long rows are) and quarantine.jsonl (each bad row
    with its reason). Rows read = used + quarantined. Exit code 2 if more than --max-bad are bad, else 0.

    A recipe is checked with its own tokenizer, template, views and max_length. Anything else is counted with
    --tokenizer, or in words.
    """
    from vlmix.core.files import publish, write_manifest
    from vlmix.data.check import FAULTS, check_source
    from vlmix.data.check_report import SCHEMA, check_folder, write_findings
    from vlmix.data.ledger import FILE_NAME, Ledger

    counted = _Counting(tokenizer, visual_tokens, max_length)
    looks = _looks(path, images, settings, counted)
    folder = out_dir or Path("runs/data_check") / _name_of(path)
    check_folder(folder)
    with publish(folder) as new, _Bars() as told:
        ledger = Ledger(new / FILE_NAME, max_bad=1.0)
        findings = [check_source(name, look, ledger, workers=workers, told=told) for name, look in looks]
        report = write_findings(new, path, findings)
        write_manifest(new, SCHEMA)
    _show(report, FAULTS)
    out().print(f"report  {folder}", soft_wrap=True)
    bad, read = report["rows"]["quarantined"], report["rows"]["read"]
    if bad > max_bad * read:
        raise InputError(
            f"{bad} of {read} rows are bad, more than {max_bad:.2%}. {folder / FILE_NAME} says which and "
            "why. Mend or remove them, or raise --max-bad and, to train, the stage's max_bad"
        )


@app.command("pack")
def pack(  # noqa: PLR0913, PLR0917 - each is an option of the command
    path: str = _PATH,
    target: Path = typer.Argument(help="The folder of shards to write; it must not exist yet."),
    images: Path = _IMAGES,
    shard_size: str = typer.Option("1GB", "--shard-size", help="About how large a shard is: 500MB, 3GB."),
    max_side: int = typer.Option(
        None, "--max-side", min=1, help="Make larger pictures this wide or high; else they are copied."
    ),
    max_bad: float = typer.Option(0.01, "--max-bad", min=0, max=1, help="Share of bad rows that is borne."),
    workers: int = _WORKERS,
    settings: list[str] = _SET,
) -> None:
    """Write PATH as tar shards that vlmix reads in any order and webdataset as a stream.

    Pictures are copied byte for byte unless --max-side makes them smaller. Every picture is opened once; a
    bad row goes to quarantine.jsonl and is not replaced. TARGET appears when all is written, with a manifest
    of checksums. Stopped or killed before, the same command goes on behind the last finished shard (they
    wait in .TARGET.packing). Equal input gives equal bytes.
    """
    from vlmix.data.pack import pack as write_shards

    source = _opened(path, images, settings)
    with _Bars() as told:
        ledger = write_shards(
            source,
            target,
            shard_bytes=_bytes(shard_size),
            max_side=max_side,
            max_bad=max_bad,
            workers=workers,
            told=told,
        )
    out().print(f"{ledger.read} rows read = {ledger.used} used + {ledger.quarantined} quarantined")
    out().print(f"shards  {target}", soft_wrap=True)


@app.command("show")
def show(
    path: str = _PATH,
    row: int = typer.Option(0, "--row", min=0, help="The row to print, counted from 0."),
    count: int = typer.Option(24, "--count", min=1, help="Rows on the page."),
    page: Path = typer.Option(None, "--out", help="The page; runs/data_show/NAME.html if left out."),
    images: Path = _IMAGES,
    settings: list[str] = _SET,
) -> None:
    """Print one row of PATH as text, and write a page with that row and those behind it, pictures included.

    A row that cannot be used is shown with the reason.
    """
    from vlmix.evals.sheet import row_view, write_sheet

    source = _opened(path, images, settings)
    if row >= len(source):
        raise InputError(f"--row {row}: {path} has {len(source)} rows, counted from 0")
    views = [row_view(source, index) for index in range(row, min(row + count, len(source)))]
    console = out()
    console.print(f"row {row} of {len(source)}: {views[0].name}", markup=False, soft_wrap=True)
    for role, text in views[0].turns:
        console.print(f"{role}: {text}", markup=False, soft_wrap=True)
    if views[0].problem:
        console.print(f"cannot be used: {views[0].problem}", style="yellow", markup=False, soft_wrap=True)
    target = page or Path("runs/data_show") / f"{_name_of(path)}.html"
    write_sheet(target, f"{path}: rows {row} to {row + len(views) - 1} of {len(source)}", views)
    console.print(f"page  {target}", soft_wrap=True)


class _Counting:
    """How lengths of a set without a recipe are counted."""

    def __init__(self, tokenizer: str | None, visual_tokens: int, max_length: int | None) -> None:
        if tokenizer is None and (visual_tokens or max_length is not None):
            raise InputError("--max-length and --visual-tokens count tokens: give --tokenizer as well")
        self.tokenizer, self.visual_tokens, self.max_length = tokenizer, visual_tokens, max_length

    def measure(self) -> Any:
        """Words, or the tokens of a tokenizer."""
        from vlmix.data.check import Words

        if self.tokenizer is None:
            return Words()
        from vlmix.models.lengths import TextLengths, load_tokenizer

        return TextLengths(load_tokenizer(self.tokenizer), self.visual_tokens, self.max_length)


def _looks(path: str, images: Path | None, settings: list[str], counted: _Counting) -> list[tuple[str, Any]]:
    """What to look at, by name: one set, or each of a recipe's."""
    from vlmix.data.check import Look
    from vlmix.train.recipe_file import shipped_recipes

    if Path(path).suffix not in {".yaml", ".yml"} and (Path(path).exists() or path not in shipped_recipes()):
        return [(_name_of(path), Look(_opened(path, images, settings), counted.measure()))]
    if images or settings or counted.tokenizer:
        raise InputError(
            "a recipe says itself what it reads and how: leave --images, --set and --tokenizer out"
        )
    return _looks_of_recipe(path)


def _looks_of_recipe(path: str) -> list[tuple[str, Any]]:
    from vlmix.data.check import Look
    from vlmix.models.lengths import TokenLengths
    from vlmix.train.build import build_processor, check_parts, open_sources, stage_processor
    from vlmix.train.data_sets import check_present
    from vlmix.train.recipe_file import load_recipe

    recipe = load_recipe(path)
    check_parts(recipe)
    check_present(recipe)
    processor, _ = build_processor(recipe)
    found = dict[tuple[str, str, str], tuple[str, Any]]()
    for stage in recipe.stages:
        measure = TokenLengths(stage_processor(processor, stage))
        for number, (data, source) in enumerate(zip(stage.data, open_sources(stage), strict=True)):
            name = data.name or f"{stage.name}.data.{number}.{data.source['kind']}"
            key = (str(data.source), str(stage.chat_template), str(stage.fit))
            found.setdefault(key, (name, Look(source, measure)))
    return list(found.values())


def _opened(path: str, images: Path | None, settings: list[str]) -> Source:
    from vlmix.core.parts import SOURCES, read_part
    from vlmix.data.detect import source_at
    from vlmix.train.recipe_file import with_overrides

    raw = with_overrides(source_at(path, images), settings)
    return SOURCES.get(raw["kind"])(read_part(SOURCES, raw, path))


def _name_of(path: str) -> str:
    """``rows`` for ``mine/rows.json``; a pattern's signs become lines."""
    return re.sub(r"[^\w.-]+", "_", Path(path).stem).strip("_.") or "data"


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]?)B?", text.strip().upper())
    if not match or not (size := int(float(match[1]) * _UNITS[match[2]])):
        raise InputError(f"--shard-size {text}: write a size such as 500MB or 3GB")
    return size


def _show(report: dict[str, Any], faults: dict[str, str]) -> None:
    console = out()
    for each in report["sets"]:
        rows, pictures = each["rows"], each["pictures"]
        console.print(f"[bold]{each['name']}[/]", soft_wrap=True)
        counts = f"{rows['read']:,} rows read = {rows['used']:,} used + {rows['quarantined']:,} quarantined"
        console.print(f"  {counts}", soft_wrap=True)
        for fault, count in each["faults"].items():
            console.print(f"  [red]{count:,} {fault.replace('_', ' ')}[/]: {faults[fault]}", soft_wrap=True)
        for part, figures in each["lengths"].items():
            if figures.get("max"):
                shown = ", ".join(f"{key} {figures[key]:,.0f}" for key in ("min", "p50", "p95", "p99", "max"))
                console.print(f"  {part} {each['unit']}: {shown}; {figures['sum']:,} in all", soft_wrap=True)
        if each["max_length"]:
            over = f"{each['over_max_length']:,} rows are longer than max_length {each['max_length']:,}"
            console.print(f"  {over}; whole turns are dropped from their front", soft_wrap=True)
        ids, shared = each["repeated_ids"]["count"], pictures["in_several_rows"]["count"]
        twice, copies = pictures["twice_in_one_row"]["count"], pictures["in_several_places"]
        console.print(
            f"  {pictures['shown']:,} pictures, {pictures['different']:,} different: {shared:,} in several "
            f"rows, {copies:,} in several places, {twice:,} twice in one row; {ids:,} ids repeat",
            soft_wrap=True,
        )
    if any(each["unit"] == "words" for each in report["sets"]):
        console.print("  lengths are in words: give --tokenizer, or check a recipe, to count tokens")


class _Bars:
    """A bar with the time left where somebody watches, else a line now and then."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._console = err()
        self._bars = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._rows = dict[str, tuple[TaskID, float]]()
        self._shown = time.monotonic()

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self._rows:
            self._rows[what] = (self._bars.add_task(what, total=total), time.monotonic())
        task, began = self._rows[what]
        self._bars.update(task, completed=done)
        if self._bars.disable and done and time.monotonic() - self._shown >= _LINE_EVERY_SECONDS:
            self._shown = time.monotonic()
            left = (self._shown - began) / done * (total - done)
            self._console.print(f"{what} {done:,}/{total:,}  {left:,.0f} s left", soft_wrap=True)
