"""A small painter on numpy arrays: backgrounds, shapes, text, boxes and lines, in far less than 1 ms."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Final

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from vlmix.core.sample import Json
from vlmix.data.synth.fonts import glyph, text_width

Colour = tuple[int, int, int]
Pixels = NDArray[np.uint8]

COLOURS: Final[dict[str, Colour]] = {
    "red": (220, 30, 40),
    "green": (30, 150, 50),
    "blue": (40, 70, 230),
    "yellow": (230, 190, 10),
    "purple": (150, 50, 190),
    "cyan": (20, 190, 205),
}
SHAPES: Final = ("circle", "square", "triangle", "diamond", "cross", "ring")


@dataclass(frozen=True, slots=True)
class Dial:
    """What every painter needs to know: picture side in pixels, difficulty 0..1, glyph height, noise."""

    image_size: int
    difficulty: float
    text_height: int
    noise: int

    def between(self, easy: int, hard: int) -> int:
        """The whole number at this difficulty on the way from ``easy`` to ``hard``."""
        return easy + round((hard - easy) * self.difficulty)

    @property
    def unit(self) -> int:
        """The width in pixels of a thin stroke: 1 on a picture of 64."""
        return max(1, self.image_size // 64)


@dataclass(frozen=True, slots=True)
class Item:
    """One picture with its question, its answer, and what is known about how it was made."""

    pixels: Pixels
    question: str
    answer: str
    details: dict[str, Json] = field(default_factory=dict[str, Json])


class Canvas:
    """A square picture being painted on a random light tint, or a dark one from a quarter of the dial on."""

    def __init__(self, rng: Generator, dial: Dial) -> None:
        self._rng, self._dial = rng, dial
        self.size = dial.image_size
        self.dark = bool(rng.integers(2)) and dial.difficulty >= 0.25
        self.background = rng.integers(0, 32, 3) if self.dark else rng.integers(224, 256, 3)
        self.pixels: Pixels = np.empty((self.size, self.size, 3), np.uint8)
        self.pixels[:] = self.background

    def ink(self) -> Colour:
        """A random tint far from the background."""
        red, green, blue = self._rng.integers(160, 256, 3) if self.dark else self._rng.integers(0, 96, 3)
        return int(red), int(green), int(blue)

    def faint(self) -> Colour:
        """A tint near the background, for grids."""
        step = 40 if self.dark else -40
        red, green, blue = (int(value) + step for value in self.background)
        return red, green, blue

    def shape(self, shape: str, colour: str, x: int, y: int, radius: int) -> None:
        """Paint a shape that fits the square of ``radius`` pixels around ``(x, y)``, inside the picture."""
        window = self.pixels[y - radius : y + radius + 1, x - radius : x + radius + 1]
        window[shape_mask(shape, radius)] = COLOURS[colour]

    def text(self, text: str, x: int, y: int, height: int, colour: Colour) -> None:
        """Write capitals and digits with the top left corner at ``(x, y)``."""
        for position, character in enumerate(text):
            ink = glyph(character, height)
            left = x + text_width(position + 1, height) - ink.shape[1]
            self.pixels[y : y + height, left : left + ink.shape[1]][ink] = colour

    def box(self, left: int, top: int, right: int, bottom: int, colour: Colour) -> None:
        """Fill a rectangle; ``right`` and ``bottom`` are outside it."""
        self.pixels[top:bottom, left:right] = colour

    def polyline(self, points: NDArray[np.int64], width: int, colour: Colour) -> None:
        """Join ``points`` (rows of x, y) by straight strokes ``width`` pixels wide."""
        steps = np.linspace(0, len(points) - 1, self.size * (len(points) - 1) + 1)
        order = np.arange(len(points))
        x = np.rint(np.interp(steps, order, points[:, 0])).astype(np.int64)
        y = np.rint(np.interp(steps, order, points[:, 1])).astype(np.int64)
        for right in range(width):
            for down in range(width):
                self.pixels[y + down, x + right] = colour

    def finish(self) -> Pixels:
        """The picture with its noise: every pixel is lighter or darker by up to ``noise`` levels.

        The three channels move together, so that averaging them does not bring small text back.
        """
        noise = self._dial.noise
        if not noise:
            return self.pixels
        moved = self.pixels + self._rng.integers(-noise, noise + 1, (self.size, self.size, 1), np.int16)
        return moved.clip(0, 255, out=moved).astype(np.uint8)


@cache
def shape_mask(shape: str, radius: int) -> NDArray[np.bool_]:
    """The ink of ``shape`` on a square of ``2 * radius + 1`` pixels."""
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    squared = x * x + y * y
    disc = squared <= (radius + 0.3) ** 2
    masks = {
        "circle": disc,
        "square": np.maximum(abs(x), abs(y)) <= round(0.8 * radius),
        "triangle": abs(x) * 2 <= y + radius,
        "diamond": abs(x) + abs(y) <= radius,
        "cross": (abs(x) <= radius * 0.3) | (abs(y) <= radius * 0.3),
        "ring": disc & (squared >= (0.6 * radius) ** 2),
    }
    return masks[shape]
