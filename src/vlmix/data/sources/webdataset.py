"""Tar shards as webdataset has them: members with one name are a row; read in any order, never unpacked.

A row is ``KEY.json`` (a LLaVA row with ``conversations``) or ``KEY.txt`` (a caption), and its pictures:
``KEY.jpg``, or ``KEY.0.jpg``, ``KEY.1.jpg`` … where there are several.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from bisect import bisect_right
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, Literal

from PIL import Image
from pydantic import Field

from vlmix.core.errors import SampleError
from vlmix.core.interfaces import Source
from vlmix.core.parts import SOURCES
from vlmix.core.sample import ImageRef, Sample, Turn
from vlmix.core.settings import PartSettings
from vlmix.data.json_rows import MAX_ROW_BYTES, parse_strict
from vlmix.data.llava_rows import (
    check_placeholders,
    conversation,
    illustrated,
    image_names,
    kind_of,
    row_id,
)
from vlmix.data.packed_rows import FIELD, unpacked
from vlmix.data.shards import Shard, ShardRow, Stretch, find_shards, named_shards

_PICTURES: Final = ("jpg", "jpeg", "png", "webp", "gif", "bmp")


class WebdatasetSettings(PartSettings):
    """Which shards: files, folders, or patterns with ``*`` and ``{000..031}``, in this order.

    A caption is the answer to one of ``questions``, taken in turn by row; without any the picture alone is
    asked about, as the ``plain`` template has it. ``index`` is a folder for the shards' indexes, where they
    shall not lie beside the shards.
    """

    kind: Literal["webdataset"] = "webdataset"  # pyright: ignore[reportIncompatibleVariableOverride]
    shards: str | tuple[str, ...]
    questions: tuple[str, ...] = ()
    index: str | None = None
    max_turns: int = Field(default=1000, ge=2)


@SOURCES.register("webdataset")
class Webdataset(Source):
    """Conversations or captions in tar shards; pictures are read when they are opened."""

    settings_class = WebdatasetSettings
    settings: WebdatasetSettings

    def __len__(self) -> int:
        """Rows of all shards, bad ones included; what a damaged shard lost counts as one."""
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Sample:
        """Read row ``index`` without its pictures.

        Raises:
            SampleError: with shard and key, if the row cannot be used.

        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of shards with {len(self)}")
        place = bisect_right(self._ends, index)
        row = self._shards[place].row(index - (self._ends[place - 1] if place else 0))
        try:
            return self._sample(row, index)
        except SampleError as error:
            reason = f"{self._shards[place].path.name}, {row.key}: {error.reason}"
            name = f"{row.key[:200]}#{index + 1}"
            raise SampleError(reason, line=index + 1, sample_id=name, fault=error.fault) from None

    def __getstate__(self) -> dict[str, Any]:
        """Settings alone travel to another process; the indexes are on disk."""
        return {"settings": self.settings}

    @classmethod
    def places(cls, settings: WebdatasetSettings) -> list[Path]:
        """Every shard by its name, ranges unfolded; a pattern that finds nothing stands for itself."""
        return named_shards(cls._patterns(settings))

    @classmethod
    def tiny(cls, folder: Path) -> WebdatasetSettings:
        """Two shards: a conversation about one picture, one about two, text only, and a caption."""
        rows = {"a": "<image>\nWhat colour is it?", "b": "<image><image>\nWhich is red?", "c": "Two and two?"}
        contents = dict[str, bytes]()
        for key, question in rows.items():
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "red"}]
            contents[f"{key}.json"] = json.dumps({"id": key, "conversations": turns}).encode()
        contents |= {"a.png": _picture("red"), "b.0.png": _picture("red"), "b.1.png": _picture("blue")}
        _write(folder / "0.tar", contents)
        _write(folder / "1.tar", {"d.txt": b"a blue thing", "d.png": _picture("blue")})
        return WebdatasetSettings(shards=f"{folder}/{{0..1}}.tar", questions=("What is it?",))

    @cached_property
    def _shards(self) -> list[Shard]:
        index = Path(self.settings.index) if self.settings.index else None
        return [Shard(path, index) for path in find_shards(self._patterns(self.settings))]

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(map(len, self._shards)))

    @staticmethod
    def _patterns(settings: WebdatasetSettings) -> tuple[str, ...]:
        return (settings.shards,) if isinstance(settings.shards, str) else settings.shards

    def _sample(self, row: ShardRow, index: int) -> Sample:
        if row.refused:
            raise SampleError(row.refused)
        tails = sorted((tail for tail in row.members if tail.rpartition(".")[2] in _PICTURES), key=_by_number)
        refs = [ImageRef(row.members[tail]) for tail in tails]
        raw = _parsed(row.members["json"]) if "json" in row.members else {}
        if "txt" in row.members and not (isinstance(raw, dict) and "conversations" in raw):
            return self._caption(row, index, refs)
        if "json" not in row.members:
            raise SampleError(f"no {row.key}.json and no {row.key}.txt among its members")
        if not isinstance(raw, dict):
            raise SampleError(f"a row must be an object, not {kind_of(raw)}")
        names = image_names(raw.get("image"))
        if len(refs) < len(names):
            raise SampleError(f"the row names {len(names)} pictures, but has {len(refs)}", fault="missing")
        spoken = conversation(raw.get("conversations"), self.settings.max_turns)
        check_placeholders(spoken, len(refs))
        turns = illustrated(spoken, refs)
        if FIELD in raw:
            return unpacked(raw[FIELD], turns)
        name = f"{row_id(raw) or row.key}#{index + 1}"
        return Sample(id=name, turns=turns, group=names[0] if names else row.key)

    def _caption(self, row: ShardRow, index: int, refs: list[ImageRef]) -> Sample:
        text = _text(row.members["txt"]).strip()
        if not text:
            raise SampleError("the caption is empty")
        if not refs:
            raise SampleError(f"no picture among the members of {row.key}", fault="missing")
        questions = self.settings.questions
        asked = (questions[index % len(questions)],) if questions else ()
        turns = (Turn("user", (*refs, *asked)), Turn("assistant", (text,)))
        return Sample(id=f"{row.key}#{index + 1}", turns=turns, group=row.key)


def _by_number(tail: str) -> tuple[list[tuple[int, str]], str]:
    """``2.jpg`` before ``10.jpg``."""
    return [(int(digits or 0), word) for digits, word in re.findall(r"(\d{1,9})|(\D+)", tail)], tail


def _raw(member: Stretch) -> bytes:
    if member.size > MAX_ROW_BYTES:
        raise SampleError(f"{member.member} has {member.size} bytes, more than {MAX_ROW_BYTES}")
    return member.read()


def _parsed(member: Stretch) -> Any:
    try:
        return parse_strict(_raw(member))
    except ValueError as error:
        raise SampleError(f"{member.member} is not valid JSON: {error}") from None


def _text(member: Stretch) -> str:
    try:
        return _raw(member).decode("utf-8")
    except UnicodeDecodeError as error:
        raise SampleError(f"{member.member} is not UTF-8: {error.reason} at byte {error.start}") from None


def _picture(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def _write(path: Path, contents: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, raw in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
