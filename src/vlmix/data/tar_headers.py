"""The members of a tar file by where their bytes lie; nothing is unpacked, and no name is used as a path.

Only headers are read, 512 bytes each, so what a header claims about sizes costs nothing. Formats: ustar, GNU
long names, PAX (IEEE Std 1003.1, pax interchange format).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

BLOCK: Final = 512
_MAX_EXTRA_BYTES: Final = 2**20  # of a long name or a PAX header; real ones have some hundred
_MAX_NAME_BYTES: Final = 4096
_REGULAR: Final = b"0\0" + b"7"
_REFUSED: Final[dict[bytes, str]] = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a pipe",
    b"S": "a sparse file",
    b"M": "a piece of a file of several volumes",
}


@dataclass(frozen=True, slots=True)
class Member:
    """A member's name, where its bytes begin and how many; ``refused`` says why they are not to be read."""

    name: str
    offset: int
    size: int
    refused: str = ""


class TarCutError(Exception):
    """From here on a tar cannot be read; ``name`` is the member that was met, if its header was whole."""

    def __init__(self, reason: str, name: str = "") -> None:
        super().__init__(reason)
        self.reason, self.name = reason, name


@dataclass(slots=True)
class _Ahead:
    """What headers before a member say about it."""

    name: bytes | None = None
    size: int | None = None
    refused: str = ""


def members(descriptor: int) -> Iterator[Member]:
    """Every member that is no folder, in order; archives that were put behind one another are read on.

    Raises:
        TarCutError: where the file is cut off or a header is damaged; members before that have been given.

    """
    total, at, ended, ahead = os.fstat(descriptor).st_size, 0, False, _Ahead()
    while at < total:
        header = os.pread(descriptor, BLOCK, at)
        if len(header) < BLOCK:
            raise TarCutError(f"the shard is cut off inside a header, at byte {total}")
        at += BLOCK
        if not any(header):
            ended = True
            continue
        ended = False
        stored, kind = _checked_size(header, at - BLOCK), header[156:157]
        stored = 0 if kind in b"123456" else stored  # these have no bytes of their own, whatever they claim
        at += _map_bytes(header, descriptor, at) if kind == b"S" else 0
        size = stored if ahead.size is None or kind in b"xgLK" else ahead.size
        name = _name(header) if ahead.name is None else ahead.name
        if at + size > total:
            shown = _text(name)
            raise TarCutError(f"the shard is cut off: {shown} needs {at + size - total} bytes more", shown)
        if kind in b"xgLK":
            _look_ahead(kind, descriptor, at, size, ahead)
        else:
            if kind != b"5":
                yield Member(_text(name), at, size, ahead.refused or _refusal(kind))
            ahead = _Ahead()
        at += -(-size // BLOCK) * BLOCK
    if not ended:
        raise TarCutError(f"the shard has no end mark at byte {total}: it was cut off between two members")


def _checked_size(header: bytes, at: int) -> int:
    expected = _number(header[148:156], at)
    unsigned = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if expected != unsigned:
        raise TarCutError(f"the header at byte {at} is damaged: its checksum is wrong")
    return _number(header[124:136], at)


def _map_bytes(header: bytes, descriptor: int, at: int) -> int:
    """How many bytes of a sparse file's map stand between its header and its data."""
    size, more = 0, header[482]
    while more:
        block = os.pread(descriptor, BLOCK, at + size)
        size, more = size + BLOCK, block[504] if len(block) == BLOCK else 0
    return size


def _number(field: bytes, at: int) -> int:
    """Octal digits, or a large number in base 256 where the first bit is set."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip(b" ")
    if any(digit not in b"01234567" for digit in digits):
        raise TarCutError(f"the header at byte {at} is damaged: {field!r} is no number")
    return int(digits or b"0", 8)


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _text(name: bytes) -> str:
    return name[:_MAX_NAME_BYTES].split(b"\0", 1)[0].decode("utf-8", "replace")


def _refusal(kind: bytes) -> str:
    if kind in _REGULAR:
        return ""
    return f"it is {_REFUSED.get(kind, f'of the unknown type {kind!r}')}, not a regular file"


def _look_ahead(kind: bytes, descriptor: int, at: int, size: int, ahead: _Ahead) -> None:
    """Read what a long name or a PAX header says about the member behind it."""
    if kind in b"gK":
        return
    if size > _MAX_EXTRA_BYTES:
        ahead.refused = f"its header has {size} bytes, more than {_MAX_EXTRA_BYTES}"
        return
    raw = os.pread(descriptor, size, at)
    if kind == b"L":
        ahead.name = raw.split(b"\0", 1)[0]
        return
    try:
        said = _records(raw)
        ahead.name = said.get(b"path", ahead.name)
        if b"size" in said:
            ahead.size = _whole(said[b"size"])
    except ValueError:
        ahead.refused = "its PAX header is damaged"
        return
    if any(key.startswith(b"GNU.sparse") for key in said):
        ahead.refused = "it is a sparse file, not a regular file"


def _records(raw: bytes) -> Mapping[bytes, bytes]:
    """``LENGTH KEY=VALUE`` and a newline, again and again."""
    found, at = dict[bytes, bytes](), 0
    while at < len(raw):
        space = raw.index(b" ", at, at + 8)
        end = at + _whole(raw[at:space])
        key, sign, value = raw[space + 1 : end - 1].partition(b"=")
        if end > len(raw) or end <= space or not sign or raw[end - 1 : end] != b"\n":
            raise ValueError("no record of a PAX header")
        found[key], at = value, end
    return found


def _whole(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > 18:
        raise ValueError("no number of a PAX header")
    return int(digits)
