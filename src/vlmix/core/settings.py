"""Strict, frozen settings: an unknown key is an error that names the nearest known one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, TypeAlias, TypeGuard, TypeVar, cast, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from vlmix.core.errors import PlanError, RecipeError, suggestion

# A shrunk decoder, for parts that reach into it.
SHRUNK_WIDTH, SHRUNK_DEPTH = 32, 2
S = TypeVar("S", bound="Settings")
Length: TypeAlias = "int | tuple[Length, ...] | None"


class Settings(BaseModel):
    """Base of every group of settings: immutable, complete, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class PartSettings(Settings):
    """Base of every part's settings; ``kind`` is the name of the file that implements the part.

    ``lengths`` names the fields that count pixels or cells along a side: they shrink together. Those that
    ``kept`` names never shrink.
    """

    lengths: ClassVar[tuple[str, ...]] = ()
    kept: ClassVar[tuple[str, ...]] = ()
    kind: str

    @classmethod
    def tiny(cls) -> Self:
        """The smallest settings that still reach every branch; the conformance suite builds these.

        Parts of the model define it. Sources and benchmarks have a ``tiny`` of their own, with a folder.
        """
        raise TypeError(f"{cls.__name__} does not define tiny(), so no suite can build it")

    def shrunk(self, factor: int) -> Self:
        """These settings at toy size: the same structure, every length a ``factor``-th of what it was.

        Whole numbers above 0 that ``tiny`` sets are lowered to its values where they are larger, lists of
        them item by item; everything else stays: it says what the part does rather than how large it is.

        Raises:
            PlanError: if a length does not divide.

        """
        small = self.tiny()
        lowered = small.model_fields_set - {*self.kept}
        counts = {name: _least(getattr(self, name), getattr(small, name)) for name in lowered}
        lengths = {name: divided(getattr(self, name), factor, name) for name in self.lengths}
        return self.changed(**{**counts, **lengths})

    def changed(self, **values: Any) -> Self:
        """A copy with other values.

        Raises:
            RecipeError: if they do not fit.

        """
        return read_settings(type(self), {**self.model_dump(), **values})


def paths_in(settings: Settings) -> Iterator[Path]:
    """Every path in settings, and in settings inside them."""
    for name in type(settings).model_fields:
        value: Any = getattr(settings, name)
        for each in cast("list[Any]", value) if isinstance(value, list) else [value]:
            if isinstance(each, Path):
                yield each
            elif isinstance(each, Settings):
                yield from paths_in(each)


def divided(length: Length, factor: int, name: str) -> Length:
    """A length, or each of several, divided by ``factor``; ``None`` stays.

    Raises:
        PlanError: if a length is no multiple of it.

    """
    if length is None:
        return None
    if isinstance(length, tuple):
        return tuple(divided(side, factor, name) for side in length)
    if length % factor:
        raise PlanError(f"{name}: {length} does not divide by {factor}")
    return length // factor


def _least(mine: object, small: object) -> object:
    """The smaller of two counts, or of each pair in two lists of one length; otherwise ``mine``."""
    if _is_count(mine) and _is_count(small):
        return min(mine, small)
    if _is_list(mine) and _is_list(small) and len(mine) == len(small):
        return tuple(_least(a, b) for a, b in zip(mine, small, strict=True))
    return mine


def _is_list(value: object) -> TypeGuard[tuple[object, ...]]:
    return isinstance(value, tuple)


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


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
    return sorted(field.alias or name for name, field in cls.model_fields.items())


def _settings_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in get_args(annotation):
        if (found := _settings_in(inner)) is not None:
            return found
    return None
