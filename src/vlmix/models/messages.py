"""Hugging Face messages -> turns, and turns -> the exchanges that truncation drops."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from vlmix.core.errors import ImageCountError, InputError
from vlmix.core.sample import ImageRef, Role, Turn
from vlmix.models.image_processing import read_image

UNSEEN: Final = ImageRef(b"")
"""Stands where a message says `{"type": "image"}` without a picture; never opened."""
ROLES: Final[Mapping[Any, Role]] = {"system": "system", "user": "user", "assistant": "assistant"}
_PICTURE_KEYS: Final = ("image", "path", "url")

Message = Mapping[str, Any]


def read_messages(messages: Sequence[Message]) -> tuple[Turn, ...]:
    """Read `{"role", "content"}` messages; content is a string or a list of text and image parts.

    Raises:
        InputError: if a role, a part or a key is none that vlmix knows; names the message.
        ImageError: if a picture is a remote address or no picture.

    """
    return tuple(_turn(message, number) for number, message in enumerate(messages))


def _turn(message: Message, number: int) -> Turn:
    role, content = ROLES.get(message.get("role")), message.get("content")
    if role is None:
        raise InputError(f"message {number}: role {message.get('role')!r} is not one of {', '.join(ROLES)}.")
    if isinstance(content, str):
        return Turn(role, (content,))
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise InputError(f"message {number}: content is a string or a list of parts, not {content!r:.80}.")
    return Turn(role, tuple(_part(part, number) for part in content))


def _part(part: Any, number: int) -> str | ImageRef:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind == "image":
        sources = [part[key] for key in _PICTURE_KEYS if part.get(key) is not None]
        if len(sources) > 1:
            raise InputError(
                f"message {number}: an image part has one of {', '.join(_PICTURE_KEYS)}, not more."
            )
        return read_image(sources[0]) if sources else UNSEEN
    raise InputError(
        f"message {number}: {part!r:.80} is no part. Parts are {{'type': 'text', 'text': …}} and "
        "{'type': 'image', 'image': …}."
    )


def places(turns: Iterable[Turn]) -> int:
    """How many image parts came without a picture."""
    return sum(part is UNSEEN for turn in turns for part in turn.parts)


def give_pictures(turns: Sequence[Turn], images: Iterable[ImageRef]) -> tuple[Turn, ...]:
    """Put one picture, in order, into each place the messages left without one."""
    supply = iter(images)
    return tuple(
        replace(turn, parts=tuple(next(supply) if part is UNSEEN else part for part in turn.parts))
        for turn in turns
    )


def group_pictures(images: Any, places: Sequence[int]) -> list[list[ImageRef]]:
    """Deal pictures to rows: one picture, a flat list in order, or one list (or None) for each row.

    Raises:
        ImageCountError: if a row has more or fewer pictures than places; names the row.

    """
    if images is None:
        images = []
    flat = list(images) if isinstance(images, list | tuple) else [images]
    if flat and all(group is None or isinstance(group, list | tuple) for group in flat):
        if len(flat) != len(places):
            raise ImageCountError(
                f"{len(flat)} lists of pictures for {len(places)} texts. Give one for each."
            )
        rows = [[read_image(image) for image in group or ()] for group in flat]
    else:
        rows = _deal([read_image(image) for image in flat], places)
    for number, (row, wanted) in enumerate(zip(rows, places, strict=True)):
        if len(row) != wanted:
            raise ImageCountError(
                f"item {number}: {wanted} image placeholders, but {len(row)} pictures. "
                "Give exactly one picture for each placeholder, in the same order."
            )
    return rows


def _deal(images: Sequence[ImageRef], places: Sequence[int]) -> list[list[ImageRef]]:
    """In order; what is left over goes to the last row, where the count then shows it."""
    rows: list[list[ImageRef]] = []
    done = 0
    for wanted in places:
        rows.append(list(images[done : done + wanted]))
        done += wanted
    if rows:
        rows[-1] += images[done:]
    return rows


def split_exchanges(turns: Sequence[Turn]) -> tuple[tuple[Turn, ...], list[tuple[Turn, ...]]]:
    """The system turns at the front, and the exchanges: what is said up to and including an answer."""
    start = next((i for i, turn in enumerate(turns) if turn.role != "system"), len(turns))
    exchanges: list[list[Turn]] = []
    for turn in turns[start:]:
        if not exchanges or (exchanges[-1][-1].role == "assistant" and turn.role != "assistant"):
            exchanges.append([])
        exchanges[-1].append(turn)
    return tuple(turns[:start]), [tuple(exchange) for exchange in exchanges]


def without_answer(turns: Iterable[Turn]) -> tuple[Turn, ...]:
    """The turns up to the last question: what a model is asked, without the answer it should give."""
    kept = list(turns)
    while kept and kept[-1].role == "assistant":
        kept.pop()
    return tuple(kept)
