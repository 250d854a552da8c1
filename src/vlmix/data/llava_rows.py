"""One row of the field's own format as turns: what a LLaVA file, a tar shard and a table share.

A row is ``{"id", "image": name or list of names, "conversations": [{"from": "human" or "gpt", "value"}]}``.
``<image>`` in a human turn stands for the next picture; anywhere else it is ordinary text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Final

from vlmix.core.errors import SampleError
from vlmix.core.sample import ImageRef, Role, Turn

PLACEHOLDER: Final = "<image>"
SPEAKERS: Final[dict[str, Role]] = {"human": "user", "gpt": "assistant", "system": "system"}
_URL: Final = re.compile(r"[a-z][a-z0-9+.-]*://|data:|file:", re.IGNORECASE)
Spoken = list[tuple[Role, str]]
"""Who speaks, and what, with placeholders still in it."""


def row_id(row: Any) -> str:
    """The row's own id, shortened; an empty string if it has none."""
    value = row.get("id", "") if isinstance(row, dict) else ""
    return str(value)[:200] if isinstance(value, str | int) else ""


def image_names(value: Any) -> list[str]:
    """What a row's ``image`` names: nothing, one picture or several.

    Raises:
        SampleError: if it is neither a path nor a list of paths.

    """
    names = [] if value is None else value if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str) or not name:
            raise SampleError(f"image must be a path or a list of paths, not {kind_of(name)}")
    return names


def conversation(value: Any, max_turns: int) -> Spoken:
    """A row's ``conversations``, checked.

    Raises:
        SampleError: if it is no list of turns that alternate, or has more than ``max_turns``.

    """
    if not isinstance(value, list):
        raise SampleError(f"conversations must be a list of turns, not {kind_of(value)}")
    if len(value) > max_turns:
        raise SampleError(f"{len(value)} turns, more than max_turns = {max_turns}")
    return alternating([_turn(turn, number) for number, turn in enumerate(value, start=1)])


def alternating(turns: Spoken) -> Spoken:
    """The same turns.

    Raises:
        SampleError: if they do not alternate.

    """
    spoken = [role for role, _ in turns]
    if spoken[:1] == ["system"]:
        del spoken[0]
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise SampleError("turns must alternate, human first and gpt last, after at most one system turn")
    return turns


def check_placeholders(spoken: Spoken, pictures: int) -> None:
    """Compare the placeholders of the human turns with the number of pictures.

    Raises:
        SampleError: if they differ.

    """
    placeholders = sum(text.count(PLACEHOLDER) for role, text in spoken if role == "user")
    if placeholders != pictures:
        raise SampleError(
            f"{placeholders} {PLACEHOLDER} in the human turns, but {pictures} pictures; make them equal",
            fault="placeholders",
        )


def illustrated(spoken: Spoken, pictures: Iterable[ImageRef]) -> tuple[Turn, ...]:
    """Turns with the pictures where their placeholders stand; there are as many."""
    refs = iter(pictures)
    return tuple(Turn(role, _parts(text, refs) if role == "user" else (text,)) for role, text in spoken)


def find_picture(root: Path, name: str) -> Path:
    """The real path of a picture, which lies inside the folder ``root``, links followed.

    Raises:
        SampleError: if it does not exist, leads out of the folder, or is no regular file.

    """
    if "\0" in name or _URL.match(name):
        raise SampleError(f"image {name[:80]!r} is not a path inside the images folder")
    inside = PurePosixPath(name).is_relative_to(root)  # a whole path, as some files have it
    for path in (PurePosixPath(name), PureWindowsPath(name)):
        if (path.anchor and not inside) or ".." in path.parts:
            raise SampleError(f"image {name[:80]!r} leads out of the images folder; use a path inside it")
    try:
        found = (root / name).resolve(strict=True)
    except (OSError, RuntimeError):
        raise SampleError(
            f"image {name[:80]!r} does not exist in the images folder", fault="missing"
        ) from None
    if not found.is_relative_to(root):
        raise SampleError(f"image {name[:80]!r} is a link that leads out of the images folder")
    if not found.is_file():
        raise SampleError(f"image {name[:80]!r} is not a regular file")
    return found


def written(turns: Sequence[Turn]) -> list[dict[str, str]]:
    """Turns as ``conversations``, pictures as placeholders: the way back from ``illustrated``.

    Raises:
        SampleError: if what somebody said has a placeholder in it, which would be read as a picture.

    """
    speakers = {role: speaker for speaker, role in SPEAKERS.items()}
    rows = list[dict[str, str]]()
    for turn in turns:
        if turn.role == "user" and PLACEHOLDER in turn.text:
            raise SampleError(f"the user says {PLACEHOLDER} without a picture; take it out of the text")
        parts = (part if isinstance(part, str) else PLACEHOLDER for part in turn.parts)
        rows.append({"from": speakers[turn.role], "value": "".join(parts)})
    return rows


def kind_of(value: Any) -> str:
    """What messages call a value of the wrong type."""
    return "nothing" if value is None or value == "" else type(value).__name__


def _turn(turn: Any, number: int) -> tuple[Role, str]:
    if not isinstance(turn, dict):
        raise SampleError(f"turn {number} must be an object, not {kind_of(turn)}")
    speaker, text = turn.get("from"), turn.get("value")
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        known = ", ".join(SPEAKERS)
        raise SampleError(f"turn {number}: `from` must be one of {known}, not {str(speaker)[:40]!r}")
    if not isinstance(text, str):
        raise SampleError(f"turn {number}: `value` must be text, not {kind_of(text)}")
    if not text.strip():
        raise SampleError(f"turn {number}: `value` is empty")
    return SPEAKERS[speaker], text


def _parts(text: str, refs: Iterator[ImageRef]) -> tuple[str | ImageRef, ...]:
    """Put the next pictures where the placeholders stand."""
    parts: list[str | ImageRef] = []
    for number, piece in enumerate(text.split(PLACEHOLDER)):
        if number:
            parts.append(next(refs))
        if piece:
            parts.append(piece)
    return tuple(parts)
