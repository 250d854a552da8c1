"""Strict, frozen settings: an unknown key is an error that names the nearest known one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from vlmix.core.errors import RecipeError, suggestion

S = TypeVar("S", bound="Settings")


class Settings(BaseModel):
    """Base of every group of settings: immutable, complete, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class PartSettings(Settings):
    """Base of every part's settings; ``kind`` is the name of the file that implements the part."""

    kind: str

    @classmethod
    def tiny(cls) -> Self:
        """The smallest settings that still reach every branch; the conformance suite builds these.

        Parts of the model define it. Sources and benchmarks have a ``tiny`` of their own, with a folder.
        """
        raise TypeError(f"{cls.__name__} does not define tiny(), so no suite can build it")


def read_settings(cls: type[S], raw: Mapping[str, Any], where: str = "") -> S:
    """Validate ``raw`` as ``cls``.

    ``where`` is the dotted path of ``raw`` in its file and starts every message.

    Raises:
        RecipeError: with one line for each thing wrong: key, value, what is allowed, nearest key.

    """
    try:
        return cls.model_validate(dict(raw))
    except ValidationError as error:
        lines = [_explain(cls, where, item) for item in error.errors(include_url=False)]
        raise RecipeError("\n".join(lines)) from None


def _explain(cls: type[BaseModel], where: str, item: Mapping[str, Any]) -> str:
    path = [str(step) for step in item["loc"]]
    key = ".".join(([where] if where else []) + path)
    if item["type"] == "extra_forbidden":
        known = _keys_at(cls, path[:-1])
        return f"{key}: unknown key.{suggestion(path[-1], known)} Known: {', '.join(known)}"
    if item["type"] == "missing":
        return f"{key}: this key is required"
    return f"{key}: {item['msg']} (got {item['input']!r})"


def _keys_at(cls: type[BaseModel], path: list[str]) -> list[str]:
    """The keys of the settings class found by walking ``path``, through lists and optional values."""
    for step in path:
        if step in cls.model_fields:
            cls = _settings_in(cls.model_fields[step].annotation) or cls
    return sorted(cls.model_fields)


def _settings_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in get_args(annotation):
        if (found := _settings_in(inner)) is not None:
            return found
    return None
