"""Telling whoever watches how far a long copy is."""

from __future__ import annotations

from collections.abc import Callable

Told = Callable[[str, int, int], None]
"""Called with what is being done, bytes done and bytes in all."""


def quiet(what: str, done: int, total: int) -> None:
    """Tell nobody."""
