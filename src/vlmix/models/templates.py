"""The chat templates that come with vlmix: ordinary Hugging Face jinja files, one for each family.

``vicuna``, ``plain``, ``chatml``, ``gemma``, ``mistral``, ``llama3``, ``phi`` and ``openchat`` are the
corrected defaults; ``llama3_mgm`` and ``mistral_mgm`` keep what the authors of Mini-Gemini did, for their
published weights.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Final

from vlmix.core.errors import UnknownNameError

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

DEFAULT: Final = "chatml"


@cache
def template_names() -> tuple[str, ...]:
    """Every template that comes with vlmix, sorted."""
    names = (entry.name for entry in _folder().iterdir())
    return tuple(sorted(name.removesuffix(".jinja") for name in names if name.endswith(".jinja")))


@cache
def load_template(name: str) -> str:
    """The jinja source of the template called ``name``.

    Raises:
        UnknownNameError: if there is none of that name.

    """
    if name not in template_names():
        raise UnknownNameError("chat template", name, template_names())
    return (_folder() / f"{name}.jinja").read_text(encoding="utf-8")


def _folder() -> Traversable:
    return files("vlmix.models") / "chat_templates"
