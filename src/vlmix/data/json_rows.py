"""Rows of a JSON array or a JSONL file by number, without holding the file in memory.

The file is scanned once for where its rows begin and end; a row is read and parsed when asked for, so one
broken row costs one row. Parsing is strict: RFC 8259 without its loopholes, depth and length bounded.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import stat
from array import array
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Final, NoReturn

from vlmix.core.errors import DataError, InputError, SampleError

MAX_ROW_BYTES: Final = 4 * 2**20
MAX_DEPTH: Final = 32

_BOM: Final = b"\xef\xbb\xbf"
_WIDE_BOMS: Final = (b"\xff\xfe", b"\xfe\xff")
_BLANKS: Final = re.compile(rb"[ \t\r\n]*+")
# A string, an object with nothing nested (most turns are such, and are skipped whole), or one character.
# Possessive, so that a long string needs no memory for steps back. A lone quote is a string without an end.
_STRING: Final = rb'"(?:[^"\\]++|\\.)*+"'
_TOKEN: Final = re.compile(_STRING + rb'|\{(?:[^"{}\[\]]++|' + _STRING + rb')*+\}|["\[\]{},]', re.DOTALL)
_LONE_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")


class JsonRows:
    """The rows of a file that begins with ``[``: elements of that array. Of any other: lines not blank.

    Raises:
        InputError: at the first use, if the file cannot be read.

    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __len__(self) -> int:
        """Rows of the file, readable or not."""
        return len(self._index.starts)

    def line(self, index: int) -> int:
        """The line, from 1, where row ``index`` begins."""
        return self._index.lines[index]

    def __getitem__(self, index: int) -> Any:
        """Parse row ``index``.

        Raises:
            SampleError: if it is not strict JSON, too long or too deep.
            DataError: if the file is gone, or was changed after it was scanned.

        """
        start, stop = self._index.starts[index], self._index.stops[index]
        if stop - start > MAX_ROW_BYTES:
            reason = f"the row has {stop - start} bytes, more than {MAX_ROW_BYTES}"
            raise SampleError(reason, line=self.line(index))
        try:
            raw = self._raw(start, stop)
        except OSError as error:
            raise DataError(
                f"{self.path} cannot be read any more: {error.strerror}. Bring it back and continue with "
                "--resume"
            ) from None
        try:
            return parse_strict(raw)
        except ValueError as error:
            raise SampleError(f"not valid JSON: {error}", line=self.line(index)) from None

    def _raw(self, start: int, stop: int) -> bytes:
        with self.path.open("rb") as file:
            if _version(os.fstat(file.fileno())) != self._index.version:
                raise DataError(f"{self.path} was changed while in use. Start again to read the new version.")
            file.seek(start)
            return file.read(stop - start)

    @cached_property
    def _index(self) -> _Index:
        try:
            return _scanned(self.path, _version(self.path.stat()))
        except OSError as error:
            raise InputError(f"{self.path} cannot be read ({error.strerror}). Check the path.") from None


class _Index:
    """Where each row begins and ends, in bytes, and on which line."""

    def __init__(self, path: Path) -> None:
        self.starts, self.stops, self.lines = array("Q"), array("Q"), array("Q")
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise InputError(f"{path} is not a regular file. Give the path of a JSON or JSONL file.")
        self.version = _version(info)
        if not info.st_size:
            return
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:2] in _WIDE_BOMS:
                raise InputError(f"{path} is UTF-16. Save it as UTF-8.")
            begin = _skip_blanks(data, len(_BOM) if data[:3] == _BOM else 0)
            self._data, self._line, self._counted = data, 1, 0
            if data[begin : begin + 1] == b"[":
                self._scan_array(begin + 1)
            else:
                self._scan_lines(begin)
            del self._data

    def _scan_lines(self, begin: int) -> None:
        while begin < len(self._data):
            end = self._data.find(b"\n", begin)
            end = len(self._data) if end < 0 else end
            if (start := _skip_blanks(self._data, begin, end)) < end:
                self._add(start, end)
            begin = end + 1

    def _scan_array(self, begin: int) -> None:
        """Cut at the commas between elements; brackets and commas inside strings do not count."""
        depth, size = 1, len(self._data)
        for token in _TOKEN.finditer(self._data, begin):
            mark = token.group() if token.end() - token.start() == 1 else b""
            if mark in {b"[", b"{"}:
                depth += 1
            elif mark in {b"]", b"}"}:
                depth -= 1
            elif mark == b'"':
                depth += 1
                break
            if depth == 0 or (depth == 1 and mark == b","):
                start = _skip_blanks(self._data, begin, token.start())
                if mark == b"," or start < token.start() or len(self.starts):
                    self._add(start, token.start())
                begin = token.end()
            if depth == 0:
                break
        start = _skip_blanks(self._data, begin)
        if start < size:
            self._add(start, size)  # cut off inside a row, or text behind the array: either way a bad row
        if depth == 1:
            self._add(size, size)  # cut off between two rows: what is missing counts as one

    def _add(self, start: int, stop: int) -> None:
        self._line += self._data[self._counted : start].count(b"\n")
        self._counted = start
        self.starts.append(start)
        self.stops.append(stop)
        self.lines.append(self._line)


@lru_cache(maxsize=8)
def _scanned(path: Path, version: tuple[int, int]) -> _Index:
    """The index of one version of a file, made once for all who read parts of it."""
    return _Index(path)


def parse_strict(raw: bytes) -> Any:
    """Parse one JSON value in UTF-8.

    Raises:
        ValueError: if it is not JSON, or has NaN or an infinite number, a key twice, half a surrogate pair,
            or more than ``MAX_DEPTH`` levels.

    """
    if not raw:
        raise ValueError("nothing stands where a row should be; is the file cut off?")
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and _depth(raw) > MAX_DEPTH:
        raise ValueError(f"more than {MAX_DEPTH} levels")
    text = raw.decode("utf-8")
    value = _DECODER.decode(text)
    if _LONE_SURROGATE.search(raw):
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def _depth(raw: bytes) -> int:
    depth = deepest = 0
    for token in _TOKEN.finditer(raw):
        mark = token.group()
        depth += (mark in {b"[", b"{"}) - (mark in {b"]", b"}"})
        deepest = max(deepest, depth)
    return deepest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} appears twice")
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number of JSON")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


def _skip_blanks(data: mmap.mmap, start: int, stop: int | None = None) -> int:
    """Return the position of the first byte from ``start`` on that is not blank, or ``stop``."""
    match = _BLANKS.match(data, start, len(data) if stop is None else stop)
    return match.end() if match else start


def _version(info: os.stat_result) -> tuple[int, int]:
    return info.st_size, info.st_mtime_ns


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)
