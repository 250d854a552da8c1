"""A data set looked through before a GPU is touched: every row read, measured, every picture decoded."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from vlmix.core.errors import ContextLengthError, ImageCountError, ImageError, SampleError
from vlmix.core.images import encoded_image
from vlmix.core.interfaces import Source
from vlmix.core.progress import Told, quiet
from vlmix.core.sample import ImageRef, Sample
from vlmix.core.stored import StoredPicture
from vlmix.data.each_row import each_row
from vlmix.data.ledger import Ledger

FAULTS: Final[dict[str, str]] = {
    "missing": "a picture is not where the row says",
    "corrupt": "a picture is damaged, too large or of another kind",
    "placeholders": "pictures and <image> differ in number",
    "too_long": "longer than max_length even after whole turns were dropped",
    "malformed": "the row is not what it should be",
}


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long a sample is: ``text`` and ``visual`` units, before anything is dropped.

    ``over``: more than the limit; ``refused`` says why it cannot be used then, if dropping turns does not
    help.
    """

    text: int
    visual: int
    over: bool = False
    refused: str = ""


class Measure(Protocol):
    """Counts a sample's length in ``unit``; the longest that is allowed is ``max_length``, if any."""

    unit: str
    max_length: int | None

    def __call__(self, sample: Sample) -> Lengths:
        """How long it is; may raise what encoding raises."""
        ...


class Words:
    """Counts words where no tokenizer is known; pictures count nothing."""

    unit: str = "words"
    max_length: int | None = None

    def __call__(self, sample: Sample) -> Lengths:
        """Words of all turns."""
        return Lengths(sum(len(turn.text.split()) for turn in sample.turns), 0)


@dataclass(frozen=True, slots=True)
class Looked:
    """What was found in one row; ``fault`` is empty if it can be used.

    ``pictures`` are digests of the encoded bytes, ``places`` digests of where they lie, of 64 bits each.
    """

    index: int
    line: int
    name: str
    fault: str = ""
    reason: str = ""
    lengths: Lengths = Lengths(0, 0)
    pictures: tuple[int, ...] = ()
    places: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Look:
    """Looks at one row of a source; travels to other processes."""

    source: Source
    measure: Measure

    def __call__(self, index: int) -> Looked:
        """Read, open and measure row ``index``."""
        line, name, shown = self.source.line(index), "", list[ImageRef]()
        try:
            sample = self.source[index]
            name, shown = sample.id, [*sample.images]
            pictures = tuple(map(_digest_of, shown))
            lengths = self.measure(sample)
        except SampleError as error:
            return Looked(index, line, error.sample_id or name, error.fault, error.reason)
        except ImageError as error:
            absent = any(isinstance(ref.source, Path) and not ref.source.exists() for ref in shown)
            return Looked(index, line, name, "missing" if absent else "corrupt", str(error))
        except ContextLengthError as error:
            return Looked(index, line, name, "too_long", str(error))
        except ImageCountError as error:
            return Looked(index, line, name, "placeholders", str(error))
        fault = "too_long" if lengths.refused else ""
        places = tuple(map(_place_of, shown))
        return Looked(index, line, name, fault, lengths.refused, lengths, pictures, places)


@dataclass(slots=True)
class Findings:
    """What was found in one set. Numbers alone are kept, some 40 bytes a row and 20 a picture."""

    name: str
    unit: str
    max_length: int | None
    rows: int
    faults: Counter[str] = field(default_factory=Counter)
    over: int = 0
    text: array[int] = field(default_factory=lambda: array("I"))
    visual: array[int] = field(default_factory=lambda: array("I"))
    ids: array[int] = field(default_factory=lambda: array("Q"))
    id_rows: array[int] = field(default_factory=lambda: array("Q"))
    pictures: array[int] = field(default_factory=lambda: array("Q"))
    places: array[int] = field(default_factory=lambda: array("Q"))
    picture_rows: array[int] = field(default_factory=lambda: array("Q"))

    def add(self, looked: Looked) -> None:
        """Take in one row."""
        if own := looked.name.removesuffix(f"#{looked.index + 1}"):
            self.ids.append(_digest(own.encode("utf-8", "replace")))
            self.id_rows.append(looked.index)
        if looked.fault:
            self.faults[looked.fault] += 1
        self.over += looked.lengths.over
        if looked.lengths.text or looked.lengths.visual:
            self.text.append(looked.lengths.text)
            self.visual.append(looked.lengths.visual)
        self.pictures.extend(looked.pictures)
        self.places.extend(looked.places)
        self.picture_rows.extend([looked.index] * len(looked.pictures))


def check_source(name: str, look: Look, ledger: Ledger, *, workers: int = 0, told: Told = quiet) -> Findings:
    """Look at every row of a source; bad ones go to the ledger, which must allow any number of them."""
    rows = len(look.source)
    found = Findings(name, look.measure.unit, look.measure.max_length, rows)
    told(name, 0, rows)
    for looked in each_row(look, rows, workers):
        found.add(looked)
        if looked.fault:
            reason = f"{looked.fault.replace('_', ' ')}: {looked.reason}"
            ledger.quarantine((name, looked.index), looked.line, looked.name, reason)
        else:
            ledger.used += 1
        told(name, looked.index + 1, rows)
    return found


def _digest_of(picture: ImageRef) -> int:
    """A digest of the encoded bytes of a picture that opens."""
    picture.open()
    return _digest(encoded_image(picture.source)[0])


def _place_of(picture: ImageRef) -> int:
    """A digest of where a picture lies; of one that lies nowhere, a number of its own."""
    source = picture.source
    name = (
        source.name
        if isinstance(source, StoredPicture)
        else source
        if isinstance(source, Path)
        else id(source)
    )
    return _digest(str(name).encode("utf-8", "replace"))


def _digest(raw: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big")
