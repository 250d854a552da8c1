"""One sentence that says everything a picture shows, for teaching eyes and projector their first words."""

from __future__ import annotations

from numpy.random import Generator

from vlmix.data.synth import charts, scenes, text
from vlmix.data.synth.drawing import Canvas, Dial, Item, Pixels

_SIDE = 3
_TEXT = ("number", "word")
_SHEETS = (("thing",), _TEXT, ("thing", *_TEXT))
_KINDS = ("scene", "scene", "scene", "number", "word", "bars", "line")


def caption(rng: Generator, dial: Dial) -> Item:
    """Describe a scene row by row, a written number or word, or a chart from left to right."""
    kind = _KINDS[rng.integers(len(_KINDS))]
    pixels, words = _described(kind, rng, dial)
    return Item(pixels, "Describe the picture.", words, {"picture": kind})


def mosaic(rng: Generator, dial: Dial) -> Item:
    """Things, numbers and words on a sheet of 3 x 3 cells, some left free, read row by row.

    Every picture teaches up to nine answers where a question teaches one, so small eyes learn to see from
    a tenth of the pictures.
    """
    return _sheet(rng, dial, _SHEETS[rng.integers(len(_SHEETS))])


def page(rng: Generator, dial: Dial) -> Item:
    """The same with numbers and words alone."""
    return _sheet(rng, dial, _TEXT)


def _sheet(rng: Generator, dial: Dial, kinds: tuple[str, ...]) -> Item:
    canvas, filled = Canvas(rng, dial), 0.4 + 0.6 * rng.random()
    step = dial.image_size // _SIDE
    shown: list[str] = []
    for cell in range(_SIDE * _SIDE):
        if rng.random() > filled:
            continue
        row, column = divmod(cell, _SIDE)
        kind = kinds[rng.integers(len(kinds))]
        if kind == "thing":
            shown.append(scenes.place(rng, canvas, column * step, row * step, step))
        else:
            written = text.number(rng, dial) if kind == "number" else text.word(rng, dial)
            text.place(rng, canvas, dial, written.upper(), (column * step, row * step, step))
            shown.append(written)
    return Item(canvas.finish(), "Read the picture.", ", ".join(shown) or "nothing", {"cells": len(shown)})


def _described(kind: str, rng: Generator, dial: Dial) -> tuple[Pixels, str]:
    if kind in {"bars", "line"}:
        chart = charts.paint_bars(rng, dial) if kind == "bars" else charts.paint_line(rng, dial)
        values = ", ".join(f"{label} {value}" for label, value in chart.values.items())
        return chart.pixels, f"a {'bar' if kind == 'bars' else 'line'} chart, {values}"
    if kind == "scene":
        item = scenes.described(rng, dial)
        return item.pixels, item.answer
    item = text.digits(rng, dial) if kind == "number" else text.words(rng, dial)
    return item.pixels, f"the {kind} {item.answer}"
