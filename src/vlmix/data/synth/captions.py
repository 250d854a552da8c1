"""One sentence that says everything a picture shows, for teaching a projector its first words."""

from __future__ import annotations

from numpy.random import Generator

from vlmix.data.synth import charts, scenes, text
from vlmix.data.synth.drawing import Dial, Item, Pixels

_KINDS = ("scene", "scene", "scene", "number", "word", "bars", "line")


def caption(rng: Generator, dial: Dial) -> Item:
    """Describe a scene row by row, a written number or word, or a chart from left to right."""
    kind = _KINDS[rng.integers(len(_KINDS))]
    pixels, words = _described(kind, rng, dial)
    return Item(pixels, "Describe the picture.", words, {"picture": kind})


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
