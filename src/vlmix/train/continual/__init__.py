"""How a sequence of tasks is learnt without forgetting, one method a file; listing them imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmix.core.registry import Registry

if TYPE_CHECKING:
    from vlmix.train.continual._base import Method

CONTINUAL: Registry[Method] = Registry("vlmix.train.continual", "continual method")
