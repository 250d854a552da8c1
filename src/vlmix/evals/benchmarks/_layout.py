"""Reading published files line by line: where each line stands, and what it holds or why it is unreadable."""

from __future__ import annotations

import base64
import binascii
import csv
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Final, TypeAlias

from vlmix.core.errors import InputError, SampleError
from vlmix.core.sample import ImageRef
from vlmix.data.json_rows import JsonRows

Lines: TypeAlias = Iterator[tuple[str, object]]
_MAX_CELL: Final = min(2**31 - 1, sys.maxsize)
"""Pictures stand in cells of some tables."""


def first_of(folder: Path, names: Sequence[str], how: str) -> Path:
    """The first of several names a published file goes by.

    Raises:
        InputError: if none is in the folder; ``how`` says where the file comes from.

    """
    for name in names:
        if (folder / name).exists():
            return folder / name
    wanted = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
    raise InputError(f"{folder}: there is no {wanted}. {how}")


def json_lines(path: Path) -> Lines:
    """The rows of a JSON array or JSONL file; one that is broken is the error it gave."""
    rows = JsonRows(path)
    for index in range(len(rows)):
        place = f"{path.name}:{rows.line(index)}"
        try:
            yield place, rows[index]
        except SampleError as error:
            yield place, error


def json_whole(path: Path) -> Any:
    """A JSON file that is one value.

    Raises:
        InputError: if it cannot be read: none of its questions can be had then.

    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}). Check the path.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}). Fetch the file again.") from None


def json_entries(path: Path, key: str) -> Lines:
    """The list, or the object's values, under ``key`` of a JSON file; an object's values get an ``id``.

    Raises:
        InputError: if there is neither.

    """
    whole = json_whole(path)
    held = whole.get(key) if isinstance(whole, dict) else None
    return entries(path, held, key)


def entries(path: Path, held: object, what: str) -> Lines:
    """The items of a list, or the values of an object, each an object, by their number or name.

    Raises:
        InputError: if it is neither.

    """
    if isinstance(held, list):
        return ((f"{path.name}:{what}[{number}]", each) for number, each in enumerate(held))
    if isinstance(held, dict):
        return ((f"{path.name}:{name}", _named(name, each)) for name, each in held.items())
    raise InputError(f"{path}: there is no list of {what} in it. Is it the file this benchmark publishes?")


def _named(name: str, each: object) -> object:
    return {"id": name, **each} if isinstance(each, dict) else each


def table_lines(path: Path, needed: Iterable[str]) -> Lines:
    """The rows of a table of tab-separated values with a header; cells may be as long as pictures are.

    Raises:
        InputError: if it cannot be read or lacks a column of ``needed``.

    """
    csv.field_size_limit(_MAX_CELL)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t")
            if missing := [name for name in needed if name not in (rows.fieldnames or ())]:
                raise InputError(f"{path}: no column {', '.join(missing)}. Is it the published table?")
            for row in rows:
                place = f"{path.name}:{rows.line_num}"
                yield (
                    place,
                    SampleError("it has more cells than the table has columns") if None in row else row,
                )
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}). Check the path.") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a table of tab-separated UTF-8 ({error}).") from None


def text_lines(path: Path) -> Iterator[tuple[int, str | SampleError]]:
    """The lines of a UTF-8 file that are not blank, by their number from 1, or why one cannot be read.

    Raises:
        InputError: if the file cannot be read.

    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}). Check the path.") from None
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if line.strip():
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield number, SampleError(f"the line is no UTF-8 ({error.reason})")


def picture(root: Path, name: object) -> ImageRef:
    """A picture inside a folder; whether it is there shows when it is opened, so that its question counts.

    Raises:
        SampleError: if the name leads out of the folder or is none.

    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise SampleError(f"no name of a picture: {str(name)[:80]!r}")
    for path in (PurePosixPath(name), PureWindowsPath(name)):
        if path.anchor or ".." in path.parts:
            raise SampleError(f"picture {name[:80]!r} leads out of its folder")
    return ImageRef(root / name)


def encoded_picture(text: object) -> ImageRef:
    """A picture written as base64; one that is not does not open, so that its question counts as wrong."""
    try:
        return ImageRef(base64.b64decode(str(text or ""), validate=True))
    except (binascii.Error, ValueError):
        return ImageRef(b"")


def row_of(raw: object) -> dict[str, Any]:
    """A line that must be an object.

    Raises:
        SampleError: if it is something else.

    """
    if not isinstance(raw, dict):
        raise SampleError("the line is no object of named fields")
    return raw


def text_of(raw: object, name: str) -> str:
    """A field that must hold text, or a number, which is written out.

    Raises:
        SampleError: if it does not.

    """
    value = raw.get(name) if isinstance(raw, dict) else None
    if isinstance(value, bool) or not isinstance(value, str | int | float) or str(value).strip() == "":
        raise SampleError(f"the field `{name}` holds no text")
    return str(value)
