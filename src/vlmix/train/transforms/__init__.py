"""What may be done to a model before a stage starts, one file each; listing them imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmix.core.registry import Registry

if TYPE_CHECKING:
    from vlmix.train.transforms._base import Transform

TRANSFORMS: Registry[Transform] = Registry("vlmix.train.transforms", "transform")
