"""What a trained mixture does with its encoders, one diagnostic a file; listing them imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmix.core.registry import Registry

if TYPE_CHECKING:
    from vlmix.evals.diagnostics._base import Diagnostic

DIAGNOSTICS: Registry[Diagnostic] = Registry("vlmix.evals.diagnostics", "diagnostic")
