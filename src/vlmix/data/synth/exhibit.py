"""One picture to show to people, with questions and their answers: what the demo asks about."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True, slots=True)
class Exhibit:
    """A picture and pairs of question and answer about it."""

    image: Image.Image
    questions: tuple[tuple[str, str], ...]
