"""Scenes as pixels, as the published pictures show them: grey boxes, gaps between, softened edges."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from vlmix.data.boxes.scene import SIDE, Box, Scene

GAP = 50
WIDTH, HEIGHT = 3 * SIDE + 2 * GAP, SIDE
GROUND, BETWEEN = 211, 128
_RGB = {"yellow": (255, 255, 0), "black": (0, 0, 0), "blue": (0, 153, 255)}
_FINE = 8


def paint_box(box: Box) -> NDArray[np.uint8]:
    """One box as (100, 100, 3) pixels."""
    pixels = np.full((SIDE, SIDE, 3), GROUND, dtype=np.uint8)
    for item in box:
        window = pixels[item.y : item.y + item.size, item.x : item.x + item.size]
        window[...] = _stamp(item.shape, item.size, item.color)[: window.shape[0], : window.shape[1]]
    return pixels


def paint_scene(scene: Scene) -> NDArray[np.uint8]:
    """All boxes side by side as (100, 400, 3) pixels."""
    pixels = np.full((HEIGHT, WIDTH, 3), BETWEEN, dtype=np.uint8)
    for index, box in enumerate(scene.boxes):
        left = index * (SIDE + GAP)
        pixels[:, left : left + SIDE] = paint_box(box)
    return pixels


def split_boxes(pixels: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """The three boxes of a (100, 400, 3) picture."""
    return [pixels[:, left : left + SIDE] for left in range(0, pixels.shape[1], SIDE + GAP)]


@lru_cache
def _stamp(shape: str, size: int, color: str) -> NDArray[np.uint8]:
    cover = _coverage(shape, size)[..., None]
    return np.rint(GROUND + cover * (np.array(_RGB[color]) - GROUND)).astype(np.uint8)


def _coverage(shape: str, size: int) -> NDArray[np.float64]:
    """The share of each pixel that the shape covers, (size, size), from a finer raster."""
    centre = (np.arange(size * _FINE) + 0.5) / _FINE
    y, x = np.meshgrid(centre, centre, indexing="ij")
    half = size / 2
    if shape == "circle":
        inside = (x - half) ** 2 + (y - half) ** 2 <= half**2
    elif shape == "triangle":
        inside = np.abs(x - half) * 2 <= y
    else:
        inside = np.ones_like(x, dtype=bool)
    return inside.reshape(size, _FINE, size, _FINE).mean(axis=(1, 3))
