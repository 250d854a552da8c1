"""One picture to show to people, with questions and their answers: what the demo asks about."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from vlmix.data.synth.drawing import Dial
from vlmix.data.synth.scenes import Thing, paint

_SEED = 20_000_003


@dataclass(frozen=True, slots=True)
class Exhibit:
    """A picture, and questions with their answers."""

    image: Image.Image
    questions: tuple[tuple[str, str], ...]


def exhibit(dial: Dial) -> Exhibit:
    """Two red circles and a blue square, at places no training set has drawn."""
    things = [Thing("red", "circle"), Thing("red", "circle"), Thing("blue", "square")]
    pixels = paint(np.random.default_rng(_SEED), dial, things)
    questions = (
        ("How many red circles are there?", "2"),
        ("What colour is the square?", "blue"),
        ("Is there a green triangle?", "no"),
    )
    return Exhibit(Image.fromarray(pixels), questions)
