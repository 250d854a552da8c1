"""Which rows of a file of conversations to read: by place, by picture, by what the human says."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt, field_validator

from vlmix.core.errors import InputError, SampleError
from vlmix.core.settings import Settings
from vlmix.data.json_rows import JsonRows


class RowSelect(Settings):
    """Rows that meet every condition given, and none of those in ``unless``.

    ``first`` and ``last`` count from 1, both included. ``pictures`` is whether a row has any; ``folders`` are
    beginnings of picture paths, such as ``gqa/``; ``listed`` is a text file with a picture's name, without
    folder and ending, on each line. ``says`` is a regular expression looked for in every human turn.
    Everything but places is found by reading the whole file once, when it is opened.
    """

    first: PositiveInt | None = None
    last: PositiveInt | None = None
    pictures: bool | None = None
    folders: Annotated[list[str], Field(min_length=1)] | None = None
    listed: Path | None = None
    says: str | None = None
    unless: list[RowSelect] = Field(default_factory=list["RowSelect"])

    @field_validator("says")
    @classmethod
    def _is_regular(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return value

    @property
    def looks_inside(self) -> bool:
        """Whether rows must be read to tell."""
        inside = (self.pictures, self.folders, self.listed, self.says)
        return any(value is not None for value in inside) or any(part.looks_inside for part in self.unless)


def chosen_rows(rows: JsonRows, select: RowSelect) -> Sequence[int]:
    """Numbers, from 0, of the chosen rows of a file, in its order.

    A row that is not valid JSON is not chosen by a condition that looks inside.

    Raises:
        InputError: if the file of picture names cannot be read.

    """
    fits, count = _condition(select), len(rows)
    low, high = (select.first or 1) - 1, min(select.last or count, count)
    inside = select.looks_inside
    return array("Q", (i for i in range(low, high) if fits(i, _row(rows, i) if inside else None)))


def _row(rows: JsonRows, index: int) -> Any:
    try:
        return rows[index]
    except SampleError:
        return None


def _condition(select: RowSelect) -> Callable[[int, Any], bool]:
    names = None if select.listed is None else _names(select.listed)
    said = None if select.says is None else re.compile(select.says)
    others = [_condition(part) for part in select.unless]

    def fits(index: int, row: Any) -> bool:
        if not (select.first or 1) <= index + 1 <= (select.last or index + 1):
            return False
        if select.looks_inside and not isinstance(row, dict):
            return False
        pictures = _pictures(row)
        return (
            (select.pictures is None or bool(pictures) == select.pictures)
            and (select.folders is None or any(name.startswith(tuple(select.folders)) for name in pictures))
            and (names is None or any(Path(name).stem in names for name in pictures))
            and (said is None or any(said.search(text) for text in _human(row)))
            and not any(other(index, row) for other in others)
        )

    return fits


def _pictures(row: Any) -> list[str]:
    value = row.get("image") if isinstance(row, dict) else None
    names = value if isinstance(value, list) else [value]
    return [name for name in names if isinstance(name, str) and name]


def _human(row: dict[str, Any]) -> list[str]:
    turns = row.get("conversations")
    said = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    return [str(turn.get("value", "")) for turn in said if turn.get("from") == "human"]


def _names(path: Path) -> frozenset[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"select.listed: {path} cannot be read ({error}). Check the path.") from None
    return frozenset(line.strip() for line in lines if line.strip())
