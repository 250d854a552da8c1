"""What a diagnostic owes, and what it finds: tables, figures, sentences and numbers for programs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmix.evals.diagnostics._subject import Subject


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under ``columns``; the first column names the row, the others are numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Figure:
    """A PNG, the stem of its file's name, and what it shows."""

    name: str
    png: bytes
    caption: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one diagnostic found.

    ``reading`` says how to read it, ``cautions`` what must not be concluded. ``data`` is for
    ``diagnostics.json``: JSON values alone, ``None`` where a number does not exist.
    """

    title: str
    reading: Sequence[str]
    tables: Sequence[Table]
    data: Mapping[str, Any]
    figures: Sequence[Figure] = field(default_factory=tuple[Figure, ...])
    cautions: Sequence[str] = ()


class Diagnostic(ABC):
    """One look at a trained mixture. It changes nothing of the model, and the same model gives the same."""

    def obstacle(self, subject: Subject) -> str:
        """Why this says nothing about such a model, as a sentence; empty if it does."""
        del subject
        return ""

    @abstractmethod
    def examine(self, subject: Subject) -> Finding:
        """Look; called only where there is no obstacle."""
