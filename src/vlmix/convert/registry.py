"""The registry of checkpoint families; making it imports no family and no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmix.core.registry import Registry

if TYPE_CHECKING:
    from vlmix.convert._family import Family

FAMILIES: Registry[Family] = Registry("vlmix.convert.families", "checkpoint family")
