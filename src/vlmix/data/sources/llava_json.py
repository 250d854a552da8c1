"""The field's own format: a folder of pictures and a JSON array or JSONL file of conversations.

A row is ``{"id", "image": path or list of paths, "conversations": [{"from": "human" or "gpt", "value"}]}``.
``<image>`` in a human turn stands for the next picture; anywhere else it is ordinary text. Rows are checked
one by one, without opening a picture; a row that cannot be used raises and is never replaced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Final, Literal

from PIL import Image
from pydantic import Field

from vlmix.core.errors import InputError, SampleError
from vlmix.core.interfaces import Source
from vlmix.core.parts import SOURCES
from vlmix.core.sample import ImageRef, Role, Sample, Turn
from vlmix.core.settings import PartSettings
from vlmix.data.json_rows import JsonRows

PLACEHOLDER: Final = "<image>"
_ROLES: Final[dict[str, Role]] = {"human": "user", "gpt": "assistant", "system": "system"}
_URL: Final = re.compile(r"[a-z][a-z0-9+.-]*://|data:|file:", re.IGNORECASE)


class LlavaJsonSettings(PartSettings):
    """The file of conversations, and the folder its picture paths start from (default: the file's own)."""

    kind: Literal["llava_json"] = "llava_json"  # pyright: ignore[reportIncompatibleVariableOverride]
    path: Path
    images: Path | None = None
    max_turns: int = Field(default=1000, ge=2)


@SOURCES.register("llava_json")
class LlavaJson(Source):
    """Conversations about pictures, read row by row from a file that is scanned once."""

    settings_class = LlavaJsonSettings
    settings: LlavaJsonSettings

    def __init__(self, settings: LlavaJsonSettings) -> None:
        super().__init__(settings)
        self._rows = JsonRows(settings.path)

    def __len__(self) -> int:
        """Rows of the file, bad ones included."""
        return len(self._rows)

    def line(self, index: int) -> int:
        """The line, from 1, where row ``index`` begins in the file."""
        return self._rows.line(index)

    def __getitem__(self, index: int) -> Sample:
        """Check row ``index`` and point to its pictures.

        Raises:
            SampleError: with line and id, if the row cannot be used.

        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a file of {len(self)}")
        row = self._rows[index]
        name = f"{_row_id(row)}#{index + 1}"  # ids repeat in published files, row numbers do not
        try:
            return self._sample(row, name)
        except SampleError as error:
            raise SampleError(error.reason, line=self.line(index), sample_id=name) from None

    @classmethod
    def tiny(cls, folder: Path) -> LlavaJsonSettings:
        """Three rows: one picture, text only, two pictures."""
        for name, colour in {"red": (220, 30, 40), "blue": (40, 70, 230)}.items():
            Image.new("RGB", (24, 16), colour).save(folder / f"{name}.png")
        rows = [
            _example("one", "<image>\nWhat colour is it?", "red", image="red.png"),
            _example("none", "What is two and two?", "4"),
            _example("two", "<image><image>\nWhich is red?", "the first", image=["red.png", "blue.png"]),
        ]
        path = folder / "rows.json"
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        return LlavaJsonSettings(path=path)

    @cached_property
    def _root(self) -> Path:
        folder = self.settings.images or self.settings.path.parent
        if not folder.is_dir():
            raise InputError(f"the images folder {folder} does not exist. Set `images` to the right one.")
        return folder.resolve()

    def _sample(self, row: Any, name: str) -> Sample:
        if not isinstance(row, dict):
            raise SampleError(f"a row must be an object, not {_kind(row)}")
        names = _image_names(row.get("image"))
        turns = _conversation(row.get("conversations"), self.settings.max_turns)
        placeholders = sum(text.count(PLACEHOLDER) for role, text in turns if role == "user")
        if placeholders != len(names):
            raise SampleError(
                f"{placeholders} {PLACEHOLDER} in the human turns, but {len(names)} pictures; make them equal"
            )
        refs = iter([ImageRef(self._find(image)) for image in names])
        return Sample(
            id=name,
            turns=tuple(
                Turn(role, _parts(text, refs) if role == "user" else (text,)) for role, text in turns
            ),
            group=names[0] if names else name,
        )

    def _find(self, name: str) -> Path:
        """Return the picture's real path, which lies inside the images folder, links followed."""
        if "\0" in name or _URL.match(name):
            raise SampleError(f"image {name[:80]!r} is not a path inside the images folder")
        for path in (PurePosixPath(name), PureWindowsPath(name)):
            if path.anchor or ".." in path.parts:
                raise SampleError(f"image {name[:80]!r} leads out of the images folder; use a path inside it")
        try:
            found = (self._root / name).resolve(strict=True)
        except (OSError, RuntimeError):
            raise SampleError(f"image {name[:80]!r} does not exist in the images folder") from None
        if not found.is_relative_to(self._root):
            raise SampleError(f"image {name[:80]!r} is a link that leads out of the images folder")
        if not found.is_file():
            raise SampleError(f"image {name[:80]!r} is not a regular file")
        return found


def _row_id(row: Any) -> str:
    """Return the row's own id, shortened; an empty string if it has none."""
    value = row.get("id", "") if isinstance(row, dict) else ""
    return str(value)[:200] if isinstance(value, str | int) else ""


def _image_names(value: Any) -> list[str]:
    names = [] if value is None else value if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str) or not name:
            raise SampleError(f"image must be a path or a list of paths, not {_kind(name)}")
    return names


def _conversation(value: Any, max_turns: int) -> list[tuple[Role, str]]:
    if not isinstance(value, list):
        raise SampleError(f"conversations must be a list of turns, not {_kind(value)}")
    if len(value) > max_turns:
        raise SampleError(f"{len(value)} turns, more than max_turns = {max_turns}")
    turns = [_turn(turn, number) for number, turn in enumerate(value, start=1)]
    spoken = [role for role, _ in turns]
    if spoken[:1] == ["system"]:
        del spoken[0]
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise SampleError("turns must alternate, human first and gpt last, after at most one system turn")
    return turns


def _turn(turn: Any, number: int) -> tuple[Role, str]:
    if not isinstance(turn, dict):
        raise SampleError(f"turn {number} must be an object, not {_kind(turn)}")
    speaker, text = turn.get("from"), turn.get("value")
    if not isinstance(speaker, str) or speaker not in _ROLES:
        known = ", ".join(_ROLES)
        raise SampleError(f"turn {number}: `from` must be one of {known}, not {str(speaker)[:40]!r}")
    if not isinstance(text, str):
        raise SampleError(f"turn {number}: `value` must be text, not {_kind(text)}")
    if not text.strip():
        raise SampleError(f"turn {number}: `value` is empty")
    return _ROLES[speaker], text


def _parts(text: str, refs: Iterator[ImageRef]) -> tuple[str | ImageRef, ...]:
    """Put the next pictures where the placeholders stand."""
    parts: list[str | ImageRef] = []
    for number, piece in enumerate(text.split(PLACEHOLDER)):
        if number:
            parts.append(next(refs))
        if piece:
            parts.append(piece)
    return tuple(parts)


def _kind(value: Any) -> str:
    return "nothing" if value is None or value == "" else type(value).__name__


def _example(name: str, question: str, answer: str, *, image: str | Sequence[str] = ()) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, **({"image": image} if image else {}), "conversations": turns}
