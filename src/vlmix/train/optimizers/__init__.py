"""Optimizers, one file each; listing them imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmix.core.registry import Registry

if TYPE_CHECKING:
    from vlmix.train.optimizers._base import OptimizerKind

OPTIMIZERS: Registry[OptimizerKind] = Registry("vlmix.train.optimizers", "optimizer")
