"""What the small copies of published layouts are written with."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

_SIZE = (32, 24)


def draw(folder: Path, *names: str) -> None:
    """Write a picture under each name, no two of one colour."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = (60 * number % 256, 40 + 90 * number % 200, 200 - 70 * number % 180)
        Image.new("RGB", _SIZE, colour).save(path)


def write(path: Path, value: object) -> None:
    """Write a value as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
