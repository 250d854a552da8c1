"""Fields of a question as the rules need them: text, whole numbers, options by letter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from string import ascii_uppercase

from vlmix.core.errors import InputError
from vlmix.core.sample import Json, Row


def value_of(row: Row, name: str) -> Json:
    """The field called ``name``.

    Raises:
        InputError: if the question has none.

    """
    if name not in row.fields:
        raise InputError(f"question {row.id}: the field `{name}` is missing; the scoring rule needs it")
    return row.fields[name]


def text_of(row: Row, name: str) -> str:
    """A field as text.

    Raises:
        InputError: if the question has none.

    """
    return str(value_of(row, name))


def whole_of(row: Row, name: str) -> int:
    """A field as a whole number.

    Raises:
        InputError: if it is absent or something else.

    """
    return _whole(row, name, value_of(row, name))


def letter_of_gold(row: Row) -> str:
    """The letter of an option, of which the gold answer is the place, from 0, or the letter itself.

    Raises:
        InputError: if it is something else.

    """
    if isinstance(row.gold, str) and row.gold in tuple(ascii_uppercase):
        return row.gold
    return chr(ord("A") + _whole(row, "gold", row.gold))


def _whole(row: Row, name: str, value: Json) -> int:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    try:
        return int(str(value))
    except ValueError:
        raise InputError(f"question {row.id}: `{name}` must be a whole number, not {value!r}") from None


def list_of(row: Row, name: str) -> Sequence[Json]:
    """A field that holds a list.

    Raises:
        InputError: if it is absent or something else.

    """
    value = value_of(row, name)
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise InputError(f"question {row.id}: `{name}` must be a list, not {value!r}")
    return value


def columns(row: Row, letters: str = ascii_uppercase) -> dict[str, str]:
    """Options that stand in fields called A, B, C …, but those that are null."""
    return {
        letter: str(option)
        for letter in letters
        if (option := row.fields.get(letter)) is not None
        and not (isinstance(option, float) and math.isnan(option))
    }


def lettered(options: Sequence[Json]) -> Mapping[str, str]:
    """A list of options by their letters, A first."""
    return {chr(ord("A") + place): str(option) for place, option in enumerate(options)}
