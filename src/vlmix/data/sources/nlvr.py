"""NLVR (Suhr et al. 2017) in its official layout: human sentences about three boxes, true or false."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from vlmix.core.errors import SampleError
from vlmix.core.interfaces import Source
from vlmix.core.parts import SOURCES
from vlmix.core.sample import ImageRef, Sample, Turn
from vlmix.core.settings import PartSettings
from vlmix.data.boxes.paint import HEIGHT, WIDTH, split_boxes
from vlmix.data.boxes.published import ORDERS, PublishedSplit, write_tiny_split

_IDENTIFIER = re.compile(r"\d+-\d+")
LABELS = ("true", "false")
_SIDES = re.compile(r"\b(left|right)", re.IGNORECASE)


class NlvrSettings(PartSettings):
    """Where the split is and how it is asked.

    ``path`` is a folder of the official layout or a tar of it; ``permutations`` is how many of a record's
    six pictures (the same boxes in another order) are rows; ``boxes`` cuts each picture into its three
    boxes, shown as three pictures; ``question`` is the wording around the sentence. ``unlike`` names another
    split (``unlike_split``): records whose sentence also stands there are left out, so that no sentence is
    shared. ``mirror`` adds each picture flipped from left to right, except where the sentence names a side.
    """

    kind: Literal["nlvr"] = "nlvr"  # pyright: ignore[reportIncompatibleVariableOverride]
    path: Path
    split: str = Field(pattern=r"^[a-z0-9]+$")
    permutations: int = Field(default=ORDERS, ge=1, le=ORDERS)
    boxes: bool = True
    question: str = "{sentence}"
    unlike: Path | None = None
    unlike_split: str = "hidden"
    mirror: bool = False

    @model_validator(mode="after")
    def _asks(self) -> Self:
        if self.question.count("{sentence}") != 1:
            raise ValueError("question: write {sentence} once, where the sentence goes")
        return self


@dataclass(frozen=True, slots=True)
class _Row:
    line: int
    order: int
    flipped: bool


@SOURCES.register("nlvr")
class Nlvr(Source):
    """One row for each record and order of the boxes; rows of one sentence share a group."""

    settings_class = NlvrSettings
    settings: NlvrSettings

    def __len__(self) -> int:
        """Records times orders, and mirrored ones where asked for."""
        return len(self._rows)

    def line(self, index: int) -> int:
        """The record's line in the split's file, from 1."""
        return self._rows[index].line

    def __getitem__(self, index: int) -> Sample:
        """The sentence with its picture, whole or as three boxes.

        Raises:
            SampleError: if the record is incomplete, or its picture is missing or of another size.

        """
        row = self._rows[index]
        record = _parse(self._published.lines[row.line - 1], row.line)
        name = f"{self.settings.split}-{record['identifier']}-{row.order}"
        picture = self._published.picture(record["identifier"], row.order)
        if picture is None:
            raise SampleError(f"no picture called {name}.png", line=row.line, sample_id=name)
        images = self._images(picture, row, name)
        question = self.settings.question.format(sentence=record["sentence"])
        return Sample(
            id=name + ("-mirrored" if row.flipped else ""),
            turns=(Turn("user", (*images, question)), Turn("assistant", (record["label"],))),
            target=record["label"],
            group=record["identifier"].partition("-")[0],
        )

    @classmethod
    def tiny(cls, folder: Path) -> NlvrSettings:
        """Two sentences about two scenes each, in the official layout."""
        write_tiny_split(folder, "dev")
        return NlvrSettings(path=folder, split="dev")

    @cached_property
    def _published(self) -> PublishedSplit:
        return PublishedSplit(self.settings.path, self.settings.split)

    @cached_property
    def _rows(self) -> list[_Row]:
        return list(self._make_rows())

    def _make_rows(self) -> Iterator[_Row]:
        settings = self.settings
        taken = _taken(PublishedSplit(settings.unlike, settings.unlike_split)) if settings.unlike else set()
        for line, text in enumerate(self._published.lines, start=1):
            sentence = _sentence(text)
            if not text.strip() or _comparable(sentence) in taken:
                continue
            sides = (False, True) if settings.mirror and not _SIDES.search(sentence) else (False,)
            for order in range(settings.permutations):
                yield from (_Row(line, order, flipped) for flipped in sides)

    def _images(self, picture: Path | bytes, row: _Row, name: str) -> list[ImageRef]:
        whole = ImageRef(picture)
        if not self.settings.boxes and not row.flipped:
            return [whole]
        pixels = np.asarray(whole.open())
        if pixels.shape != (HEIGHT, WIDTH, 3):
            size = f"{pixels.shape[1]} x {pixels.shape[0]}"
            raise SampleError(f"{name}.png is {size}, not {WIDTH} x {HEIGHT}", line=row.line, sample_id=name)
        if row.flipped:
            pixels = pixels[:, ::-1]
        parts = split_boxes(pixels) if self.settings.boxes else [pixels]
        return [ImageRef(Image.fromarray(part)) for part in parts]


def _parse(text: str, line: int) -> Mapping[str, Any]:
    """The record of one line, with every field a row needs."""
    try:
        record = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise SampleError(f"not valid JSON: {error}", line=line) from None
    if not isinstance(record, dict):
        raise SampleError(f"a record must be an object, not {type(record).__name__}", line=line)
    for field in ("sentence", "identifier", "label"):
        if not isinstance(record.get(field), str):
            raise SampleError(f"`{field}` must be text, it is {record.get(field)!r}", line=line)
    if not _IDENTIFIER.fullmatch(record["identifier"]):
        raise SampleError(f"`identifier` must be like '12-0', it is {record['identifier']!r}", line=line)
    if record["label"] not in LABELS:
        raise SampleError(f"`label` must be 'true' or 'false', it is {record['label']!r}", line=line)
    return record


def _sentence(text: str) -> str:
    """The sentence of a line, or nothing where the line is broken: reading the row will say why."""
    try:
        return str(_parse(text, 0)["sentence"])
    except SampleError:
        return ""


def _comparable(sentence: str) -> str:
    return " ".join(re.findall(r"\w+", sentence.lower()))


def _taken(published: PublishedSplit) -> set[str]:
    """What the split's sentences say, without case and punctuation; broken lines say nothing."""
    return {_comparable(_sentence(line)) for line in published.lines} - {""}
