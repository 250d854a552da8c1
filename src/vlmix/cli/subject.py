"""Who is judged: a model folder, a served model, or a file of answers. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """Exactly one of ``folder``, ``url`` and ``answers`` is set; ``title`` is what the report calls it."""

    title: str
    folder: Path | None = None
    url: str = ""
    model_name: str = ""
    key_variable: str = ""
    answers: Path | None = None
