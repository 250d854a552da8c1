"""Files of answers that evaluation scripts of other projects left behind, and those of our own reports."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vlmix.core.errors import InputError
from vlmix.core.sample import Sample

_IDS: Final = ("question_id", "sample_id")
_TEXTS: Final = ("text", "answer")
_SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class AnswerFile:
    """The answers of a file by the id of their question; rows that tell of an error are left out."""

    path: Path
    texts: dict[str, str]

    def notes(self, samples: Iterable[Sample]) -> list[str]:
        """Sentences on questions without an answer and on answers to no question, where there are any."""
        asked = {sample.id for sample in samples}
        missing, strangers = sorted(asked - set(self.texts)), sorted(set(self.texts) - asked)
        told: list[str] = []
        if missing:
            told.append(
                f"{len(missing)} of {len(asked)} questions have no answer in {self.path.name} and count as "
                f"wrong: {_some(missing)}."
            )
        if strangers:
            told.append(
                f"{len(strangers)} answers in {self.path.name} belong to no question and count for nothing: "
                f"{_some(strangers)}."
            )
        return told


def read_answers(path: Path) -> AnswerFile:
    """Read JSONL rows, or a JSON list of them: an id (``question_id``) and an answer (``text``).

    ``sample_id`` and ``answer``, as our own reports have them, are taken too. Ids may be numbers.

    Raises:
        InputError: if the file cannot be read, a row is none, or two rows answer one question.

    """
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text: {error}") from None
    texts: dict[str, str] = {}
    lines: dict[str, int] = {}
    for number, row in _rows(path, content):
        if not isinstance(row, dict):
            raise InputError(f"{path}: row {number} is {type(row).__name__}, not an object")
        name, text = _found(row, _IDS, path, number), _found(row, _TEXTS, path, number)
        if isinstance(name, bool) or not isinstance(name, str | int) or not isinstance(text, str):
            raise InputError(f"{path}: row {number}: the id must be text or a whole number, the answer text")
        name = str(name)
        if name in lines:
            raise InputError(
                f"{path}: rows {lines[name]} and {number} both answer question {name!r}; keep one of them"
            )
        lines[name] = number
        if not row.get("error"):
            texts[name] = text
    if not lines:
        raise InputError(f"{path} holds no answer")
    return AnswerFile(path, texts)


def _rows(path: Path, content: str) -> list[tuple[int, Any]]:
    if content.lstrip().startswith("["):
        return list(enumerate(_parsed(path, content, 1), 1))
    lines = enumerate(content.split("\n"), 1)
    return [(number, _parsed(path, line, number)) for number, line in lines if line.strip()]


def _parsed(path: Path, text: str, number: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: row {number} is no JSON: {error}") from None


def _found(row: dict[str, Any], names: Sequence[str], path: Path, number: int) -> Any:
    """The first of these fields that the row has."""
    for name in names:
        if name in row:
            return row[name]
    raise InputError(f"{path}: row {number} has none of the fields {', '.join(names)}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
