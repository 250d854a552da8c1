"""Student's t: how much of it lies within a distance, and the distance that holds a share of it.

Abramowitz and Stegun 1964, formulas 26.7.3 and 26.7.4: finite sums, exact for whole degrees of freedom.
"""

from __future__ import annotations

import math


def inside(distance: float, degrees: int) -> float:
    """The share of Student's t with ``degrees`` of freedom that lies within ``distance`` of 0."""
    angle = math.atan(abs(distance) / math.sqrt(degrees))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = degrees % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for index in range(1, degrees, 2):
        total += term
        term *= square * ((index + 1) / (index + 2) if odd else index / (index + 1))
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def quantile(share: float, degrees: int) -> float:
    """The distance from 0 within which ``share`` of Student's t lies."""
    low, high = 0.0, 1.0
    while inside(high, degrees) < share:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle, degrees) < share else (low, middle)
    return high
