"""Tensor names of one layout -> another, as data that works in both directions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

_FIELD = re.compile(r"\{(\w+)\}")
# Which part of our tensor theirs fills: nothing for the whole, else indexes along its first axes.
Box = tuple[int | slice, ...]


@dataclass(frozen=True)
class Piece:
    """One tensor of theirs, and the part of ours that it fills.

    ``cut`` says which part of theirs that is: the i-th of n equal ones along its first axis.
    """

    theirs: str
    box: Box = ()
    cut: tuple[int, int] = (0, 1)

    def within(self, rows: int) -> Box:
        """Which part of theirs, that has so many rows, it is."""
        number, parts = self.cut
        return () if parts == 1 else (slice(number * rows // parts, (number + 1) * rows // parts),)


@dataclass(frozen=True)
class Rename:
    """``theirs`` is called ``ours``. ``{n}`` stands for a number, ``{rest}`` and any other for the rest."""

    theirs: str
    ours: str

    def to_ours(self, name: str) -> str | None:
        """Our name, or ``None`` if the rule is about something else."""
        found = self._theirs.fullmatch(name)
        return None if found is None else self.ours.format(**found.groupdict())

    def pieces(self, name: str, shape: Sequence[int]) -> tuple[Piece, ...] | None:
        """Their one tensor that is ours, or ``None`` if the rule is about something else."""
        found = self._ours.fullmatch(name)
        return None if found is None else (Piece(self.theirs.format(**found.groupdict())),)

    @cached_property
    def _theirs(self) -> re.Pattern[str]:
        return _compiled(self.theirs)

    @cached_property
    def _ours(self) -> re.Pattern[str]:
        return _compiled(self.ours)


@dataclass(frozen=True)
class Stack:
    """Many tensors of theirs make one of ours, as transformers 5 stores a layer's experts.

    ``{e}`` in their names counts along our first axis, which theirs have not; where there are several
    names, theirs follow one another along our second axis.
    """

    theirs: tuple[str, ...]
    ours: str

    def to_ours(self, name: str) -> str | None:
        """The name of our tensor that theirs is a piece of, or ``None``."""
        for pattern in self._theirs:
            if (found := pattern.fullmatch(name)) is not None:
                return self.ours.format(**found.groupdict())
        return None

    def pieces(self, name: str, shape: Sequence[int]) -> tuple[Piece, ...] | None:
        """Every tensor of theirs that ours, of this shape, is made of, or ``None``."""
        found = self._ours.fullmatch(name)
        if found is None:
            return None
        rows = shape[1] // len(self.theirs)
        return tuple(
            Piece(theirs.format(**found.groupdict(), e=e), (e, slice(i * rows, (i + 1) * rows)))
            for e in range(shape[0])
            for i, theirs in enumerate(self.theirs)
        )

    @cached_property
    def _theirs(self) -> list[re.Pattern[str]]:
        return [_compiled(theirs) for theirs in self.theirs]

    @cached_property
    def _ours(self) -> re.Pattern[str]:
        return _compiled(self.ours)


@dataclass(frozen=True)
class Cut:
    """One tensor of theirs is several of ours, of one size, which follow one another along its first axis."""

    theirs: str
    ours: tuple[str, ...]

    def to_ours(self, name: str) -> str | None:
        """The name of the first of ours, or ``None`` if the rule is about something else."""
        found = self._theirs.fullmatch(name)
        return None if found is None else self.ours[0].format(**found.groupdict())

    def pieces(self, name: str, shape: Sequence[int]) -> tuple[Piece, ...] | None:
        """The part of theirs that is ours, or ``None``."""
        for number, pattern in enumerate(self._ours):
            if (found := pattern.fullmatch(name)) is not None:
                return (Piece(self.theirs.format(**found.groupdict()), cut=(number, len(self.ours))),)
        return None

    @cached_property
    def _theirs(self) -> re.Pattern[str]:
        return _compiled(self.theirs)

    @cached_property
    def _ours(self) -> list[re.Pattern[str]]:
        return [_compiled(ours) for ours in self.ours]


Rule = Rename | Stack | Cut


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

    renames: Sequence[Rule] = field(default=())
    unused: Sequence[Unused] = field(default=())

    def ours(self, name: str) -> str | None:
        """Our name of their tensor, or ``None`` if no rule gives one."""
        return next((found for rule in self.renames if (found := rule.to_ours(name)) is not None), None)

    def pieces(self, name: str, shape: Sequence[int]) -> tuple[Piece, ...] | None:
        """Their tensors that make up ours, or ``None`` if no rule says which."""
        return next((found for rule in self.renames if (found := rule.pieces(name, shape)) is not None), None)

    def theirs(self, name: str) -> str | None:
        """Their name of our tensor where one of theirs is the whole of it, else ``None``."""
        pieces = self.pieces(name, (0, 0)) or ()
        return pieces[0].theirs if len(pieces) == 1 and pieces[0].cut == (0, 1) else None

    def reason(self, name: str) -> str | None:
        """Why their tensor has no place here, or ``None`` if no rule says so."""
        return next((rule.reason for rule in self.unused if rule.explains(name)), None)

    def __add__(self, other: Names) -> Names:
        return Names((*self.renames, *other.renames), (*self.unused, *other.unused))


def _compiled(template: str) -> re.Pattern[str]:
    def group(name: str) -> str:
        return f"(?P<{name}>" + (r"\d+" if len(name) == 1 else ".+") + ")"

    pieces = _FIELD.split(template)
    return re.compile(
        "".join(group(piece) if index % 2 else re.escape(piece) for index, piece in enumerate(pieces))
    )
