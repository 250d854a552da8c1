"""A recipe's data sets: which are missing and where to get them, how many rows they have or should have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from vlmix.core.errors import InputError
from vlmix.core.interfaces import Source
from vlmix.core.parts import SOURCES, read_part
from vlmix.train.build import open_source
from vlmix.train.recipe import DataSettings, Recipe, Stage
from vlmix.train.starting import check_starts

_SHOWN = 4  # of the files that one set lacks


def check_present(recipe: Recipe) -> None:
    """Look for every file and folder that the recipe reads: data, and other runs; no data is opened.

    Raises:
        InputError: with one line for each data set that is missing: its name, where it was looked for, where
            to get it and where to put it; and one for each run.
        CheckpointError: if a run that a stage starts from has other experts.

    """
    lines: dict[str, str] = {}
    for where, data in _data_of(recipe):
        if absent := missing_paths(data):
            paths = " and ".join(str(path) for path in absent[:_SHOWN])
            paths += f" and {len(absent) - _SHOWN:,} more" if len(absent) > _SHOWN else ""
            remedy = f"Where from and where to: {data.get}" if data.get else _own_word(data)
            lines.setdefault(paths, f"{where}: {_called(data)}{paths} not found. {remedy}")
    for where, run in _runs_of(recipe):
        if not Path(run).exists():
            lines.setdefault(
                run, f"{where}: {run} not found. An earlier run makes it; the recipe says which."
            )
    if lines:
        raise InputError(
            "something is missing; nothing was started:\n"
            + "\n".join(lines.values())
            + "\nTo rehearse the recipe without them, add --tiny."
        )
    check_starts(recipe)


def missing_paths(data: DataSettings) -> list[Path]:
    """The files and folders a source needs that are not there."""
    places = SOURCES.get(data.source["kind"]).places(read_part(SOURCES, data.source))
    return [path for path in places if not path.exists()]


def planned_sizes(stage: Stage) -> tuple[list[int] | None, list[str]]:
    """Rows of each source, published numbers standing in for absent ones, and notes on both.

    No sizes where a source is absent whose number of rows the recipe does not say.
    """
    sizes: list[int] = []
    notes: list[str] = []
    for data in stage.data:
        try:
            sizes.append(len(open_source(data.source)))
        except InputError:
            if data.rows is None:
                return None, notes
            sizes.append(data.rows)
            notes.append(f"{_called(data)}absent; planned with its published {data.rows:,} rows")
            continue
        notes += _row_notes(data, sizes[-1])
    return sizes, notes


def row_notes(stage: Stage, sources: Sequence[Source]) -> list[str]:
    """A line for each opened source that has another number of rows than published."""
    pairs = zip(stage.data, sources, strict=True)
    return [line for data, source in pairs for line in _row_notes(data, len(source))]


def _row_notes(data: DataSettings, found: int) -> list[str]:
    if data.rows is None or abs(found - data.rows) <= _rounding(data.rows) / 2:
        return []
    return [f"{_called(data)}{found:,} rows here, published with {data.rows:,}"]


def _rounding(rows: int) -> int:
    """What the number was rounded to: 1000 for 39000, 1 for 558128."""
    return 10 ** (len(str(rows)) - len(str(rows).rstrip("0")))


def _data_of(recipe: Recipe) -> Iterator[tuple[str, DataSettings]]:
    for s, stage in enumerate(recipe.stages):
        for d, data in enumerate(stage.data):
            yield f"stages.{s}.data.{d}", data


def _runs_of(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Folders of other runs that stages take weights from."""
    for s, stage in enumerate(recipe.stages):
        if stage.start_from != "previous":
            yield f"stages.{s}.start_from", stage.start_from
        for b, raw in enumerate(stage.before):
            if raw.get("from") is not None:
                yield f"stages.{s}.before.{b}", str(raw["weights"])


def _called(data: DataSettings) -> str:
    return f"{data.name}: " if data.name else ""


def _own_word(data: DataSettings) -> str:
    """What the source itself says when it is opened, where it refuses."""
    try:
        len(open_source(data.source))
    except InputError as error:
        return str(error)
    return "Put it there, or change the path."
