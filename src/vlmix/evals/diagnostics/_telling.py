"""Numbers as diagnostics print them, and as they write them for programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from vlmix.evals.statistics import Interval

NONE = "-"
"""Stands where a number does not exist."""
_DIGITS = 6


def percent(value: float | None) -> str:
    """A share of 1 in percent."""
    return NONE if value is None else f"{100 * value:.1f}"


def spread(interval: Interval | None) -> str:
    """An interval of a share, in percent."""
    return NONE if interval is None else f"{percent(interval.low)} to {percent(interval.high)}"


def number(value: float | None, digits: int = 3) -> str:
    """A plain number."""
    return NONE if value is None else f"{value:.{digits}f}"


def rounded(value: float | None) -> float | None:
    """A number as it is written: six decimals."""
    return None if value is None else round(float(value), _DIGITS)


def written(interval: Interval | None) -> Mapping[str, Any] | None:
    """An interval for programs."""
    if interval is None:
        return None
    return {name: rounded(v) if isinstance(v, float) else v for name, v in asdict(interval).items()}
