"""Diagrams in which letters stand in the place of words, drawn when somebody looks."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from PIL import ImageDraw, ImageFont

from vlmix.core.images import open_image
from vlmix.core.stored import StoredPicture

_WIDTH_OF_LETTER = 0.8
"""Of the height of its type, with room to both sides."""


class Box(NamedTuple):
    """A rectangle in pixels, and the letter that fills it."""

    left: float
    top: float
    right: float
    bottom: float
    letter: str


@dataclass(frozen=True, slots=True)
class LetteredPicture(StoredPicture):
    """A picture whose boxes are painted white, each with its letter in black."""

    path: Path
    boxes: tuple[Box, ...]

    @property
    def name(self) -> str:
        """The path of the picture without letters."""
        return str(self.path)

    def open(self) -> IO[bytes]:
        """The picture with its letters, as PNG.

        Raises:
            ImageError: if the picture is missing or cannot be read.

        """
        image = open_image(self.path)
        draw = ImageDraw.Draw(image)
        for box in self.boxes:
            height, width = box.bottom - box.top, box.right - box.left
            if height < 1 or width < 1:
                continue
            draw.rectangle(box[:4], fill="white")
            font = ImageFont.load_default(max(4.0, min(height, width / _WIDTH_OF_LETTER)))
            middle = ((box.left + box.right) / 2, (box.top + box.bottom) / 2)
            draw.text(middle, box.letter, fill="black", font=font, anchor="mm")
        encoded = io.BytesIO()
        image.save(encoded, format="PNG", compress_level=1)
        encoded.seek(0)
        return encoded
