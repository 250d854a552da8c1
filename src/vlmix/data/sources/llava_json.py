"""The field's own format: a folder of pictures and a JSON array or JSONL file of conversations.

A row is ``{"id", "image": path or list of paths, "conversations": [{"from": "human" or "gpt", "value"}]}``.
``<image>`` in a human turn stands for the next picture; anywhere else it is ordinary text. Rows are checked
one by one, without opening a picture; a row that cannot be used raises and is never replaced.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from pydantic import Field

from vlmix.core.errors import InputError, SampleError
from vlmix.core.interfaces import Source
from vlmix.core.parts import SOURCES
from vlmix.core.sample import ImageRef, Sample
from vlmix.core.settings import PartSettings
from vlmix.data.json_rows import JsonRows
from vlmix.data.llava_rows import (
    check_placeholders,
    conversation,
    find_picture,
    illustrated,
    image_names,
    kind_of,
    row_id,
)
from vlmix.data.selection import RowSelect, chosen_rows


class LlavaJsonSettings(PartSettings):
    """The file of conversations, and the folder its picture paths start from (default: the file's own).

    With ``select`` only some of its rows are read; they keep their names and lines.
    """

    kind: Literal["llava_json"] = "llava_json"  # pyright: ignore[reportIncompatibleVariableOverride]
    path: Path
    images: Path | None = None
    max_turns: int = Field(default=1000, ge=2)
    select: RowSelect | None = None


@SOURCES.register("llava_json")
class LlavaJson(Source):
    """Conversations about pictures, read row by row from a file that is scanned once."""

    settings_class = LlavaJsonSettings
    settings: LlavaJsonSettings

    def __init__(self, settings: LlavaJsonSettings) -> None:
        super().__init__(settings)
        self._rows = JsonRows(settings.path)

    def __len__(self) -> int:
        """Rows of the file that are read, bad ones included."""
        return len(self._rows if self._chosen is None else self._chosen)

    def line(self, index: int) -> int:
        """The line, from 1, where row ``index`` begins in the file."""
        return self._rows.line(self._place(index))

    def __getitem__(self, index: int) -> Sample:
        """Check row ``index`` and point to its pictures.

        Raises:
            SampleError: with line and id, if the row cannot be used.

        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a file of {len(self)}")
        place = self._place(index)
        row = self._rows[place]
        name = f"{row_id(row)}#{place + 1}"  # ids repeat in published files, row numbers do not
        try:
            return self._sample(row, name)
        except SampleError as error:
            line = self.line(index)
            raise SampleError(error.reason, line=line, sample_id=name, fault=error.fault) from None

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
        return LlavaJsonSettings(path=path, select=None)

    @cached_property
    def _chosen(self) -> Sequence[int] | None:
        return None if self.settings.select is None else chosen_rows(self._rows, self.settings.select)

    def _place(self, index: int) -> int:
        """The row's number in the file."""
        return index if self._chosen is None else self._chosen[index]

    @cached_property
    def _root(self) -> Path:
        folder = self.settings.images or self.settings.path.parent
        if not folder.is_dir():
            raise InputError(f"the images folder {folder} does not exist. Set `images` to the right one.")
        return folder.resolve()

    def _sample(self, row: Any, name: str) -> Sample:
        if not isinstance(row, dict):
            raise SampleError(f"a row must be an object, not {kind_of(row)}")
        names = image_names(row.get("image"))
        spoken = conversation(row.get("conversations"), self.settings.max_turns)
        check_placeholders(spoken, len(names))
        refs = [ImageRef(find_picture(self._root, image)) for image in names]
        return Sample(id=name, turns=illustrated(spoken, refs), group=names[0] if names else name)


def _example(name: str, question: str, answer: str, *, image: str | Sequence[str] = ()) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, **({"image": image} if image else {}), "conversations": turns}
