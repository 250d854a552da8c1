"""Tensor names of one layout -> another, as data that works in both directions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Rename:
    """``theirs`` is called ``ours``. ``{n}`` stands for a number, ``{rest}`` and any other for the rest."""

    theirs: str
    ours: str

    def to_ours(self, name: str) -> str | None:
        """Our name, or ``None`` if the rule is about something else."""
        return _moved(self._theirs, self.ours, name)

    def to_theirs(self, name: str) -> str | None:
        """Their name, or ``None`` if the rule is about something else."""
        return _moved(self._ours, self.theirs, name)

    @cached_property
    def _theirs(self) -> re.Pattern[str]:
        return _compiled(self.theirs)

    @cached_property
    def _ours(self) -> re.Pattern[str]:
        return _compiled(self.ours)


@dataclass(frozen=True)
class Unused:
    """Tensors that vlmix has no place for, and why; they are kept aside for the way back."""

    theirs: str
    reason: str

    def explains(self, name: str) -> bool:
        """Whether the rule is about ``name``."""
        return _compiled(self.theirs).fullmatch(name) is not None


@dataclass(frozen=True)
class Names:
    """The rules of one checkpoint; the first that fits counts."""

    renames: Sequence[Rename]
    unused: Sequence[Unused] = field(default=())

    def ours(self, name: str) -> str | None:
        """Our name of their tensor, or ``None`` if no rule gives one."""
        return next((found for rule in self.renames if (found := rule.to_ours(name)) is not None), None)

    def theirs(self, name: str) -> str | None:
        """Their name of our tensor, or ``None`` if no rule gives one."""
        return next((found for rule in self.renames if (found := rule.to_theirs(name)) is not None), None)

    def reason(self, name: str) -> str | None:
        """Why their tensor has no place here, or ``None`` if no rule says so."""
        return next((rule.reason for rule in self.unused if rule.explains(name)), None)


def _compiled(template: str) -> re.Pattern[str]:
    def group(name: str) -> str:
        return f"(?P<{name}>" + (r"\d+" if len(name) == 1 else ".+") + ")"

    pieces = _FIELD.split(template)
    return re.compile(
        "".join(group(piece) if index % 2 else re.escape(piece) for index, piece in enumerate(pieces))
    )


def _moved(pattern: re.Pattern[str], template: str, name: str) -> str | None:
    found = pattern.fullmatch(name)
    return None if found is None else template.format(**found.groupdict())
