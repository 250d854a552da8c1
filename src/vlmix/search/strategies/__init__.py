"""Ways through a space of choices, one a file; listing them imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmix.core.registry import Registry

if TYPE_CHECKING:
    from vlmix.search.strategies._base import Strategy

STRATEGIES: Registry[Strategy] = Registry("vlmix.search.strategies", "search strategy")
