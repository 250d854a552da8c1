"""Charts with a scale from 0 to 9: the value of a bar, the value at a point of a line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.random import Generator

from vlmix.data.synth.drawing import COLOURS, Canvas, Dial, Item, Pixels
from vlmix.data.synth.fonts import SMALL_HEIGHT

MAX_VALUE: Final = 9
_LETTERS: Final = "ABCDEF"


@dataclass(frozen=True, slots=True)
class Chart:
    """A painted chart and the values it shows, by label, from left to right."""

    pixels: Pixels
    values: dict[str, int]


def bars(rng: Generator, dial: Dial) -> Item:
    """The value of the bar of one colour."""
    chart = paint_bars(rng, dial)
    asked = tuple(chart.values)[rng.integers(len(chart.values))]
    return _item(chart, asked, f"What is the value of the {asked} bar?")


def lines(rng: Generator, dial: Dial) -> Item:
    """The value of a line above one label."""
    chart = paint_line(rng, dial)
    asked = tuple(chart.values)[rng.integers(len(chart.values))]
    return _item(chart, asked, f"What is the value at {asked}?")


def _item(chart: Chart, asked: str, question: str) -> Item:
    return Item(chart.pixels, question, str(chart.values[asked]), {"points": len(chart.values)})


def paint_bars(rng: Generator, dial: Dial) -> Chart:
    """Bars of different colours on a ruled sheet."""
    number = dial.between(3, len(COLOURS))
    names = [tuple(COLOURS)[i] for i in rng.permutation(len(COLOURS))[:number]]
    values = _values(rng, number)
    sheet = _Sheet(rng, dial, number)
    half = max(1, sheet.slot * 3 // 10)
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        x = sheet.x(i)
        sheet.canvas.box(x - half, sheet.y(value), x + half + 1, sheet.y(0), COLOURS[name])
    return Chart(sheet.canvas.finish(), dict(zip(names, values, strict=True)))


def paint_line(rng: Generator, dial: Dial) -> Chart:
    """One line through marked points above letters."""
    number = dial.between(3, len(_LETTERS))
    values = _values(rng, number)
    sheet = _Sheet(rng, dial, number)
    colour = tuple(COLOURS.values())[rng.integers(len(COLOURS))]
    points = np.array([(sheet.x(i), sheet.y(value)) for i, value in enumerate(values)])
    sheet.canvas.polyline(points, dial.unit, colour)
    for i, (x, y) in enumerate(points.tolist()):
        mark = dial.unit + 1
        sheet.canvas.box(x - mark, y - mark, x + mark + 1, y + mark + 1, colour)
        top = sheet.y(0) + 2 * dial.unit
        sheet.canvas.text(_LETTERS[i], x - dial.unit, top, sheet.letter_height, sheet.ink)
    return Chart(sheet.canvas.finish(), dict(zip(_LETTERS, values, strict=False)))


def _values(rng: Generator, number: int) -> list[int]:
    return [int(value) for value in rng.integers(1, MAX_VALUE + 1, size=number)]


class _Sheet:
    """Axis, rules and scale; turns positions and values into pixels."""

    def __init__(self, rng: Generator, dial: Dial, number: int) -> None:
        unit = dial.unit
        self.canvas = Canvas(rng, dial)
        self.ink = self.canvas.ink()
        self.letter_height = SMALL_HEIGHT * unit
        self._left = self.letter_height + 2 * unit
        self._base = dial.image_size - self.letter_height - 4 * unit
        self._rise = (self._base - 4 * unit) // MAX_VALUE
        self.slot = (dial.image_size - self._left - unit) // number
        rule = self.canvas.faint()
        for value in range(1, MAX_VALUE + 1):
            self.canvas.box(self._left, self.y(value), dial.image_size, self.y(value) + unit, rule)
            if value % 3 == 0:
                top = self.y(value) - 2 * unit
                self.canvas.text(str(value), unit, top, self.letter_height, self.ink)
        self.canvas.box(self._left, self._base, dial.image_size, self._base + unit, self.ink)

    def x(self, position: int) -> int:
        """The middle of slot ``position``."""
        return self._left + position * self.slot + self.slot // 2

    def y(self, value: int) -> int:
        """The height of ``value``, from the top."""
        return self._base - value * self._rise
