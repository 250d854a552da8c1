"""The schema of a grid file: what may be combined, how it is searched, and what is best. No torch."""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Self

from pydantic import Field, field_validator, model_validator

from vlmix.core.settings import Settings

Raw = dict[str, Any]
Text = Annotated[str, Field(min_length=1)]
ENCODERS_AXIS: Final = "encoders"
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]*")


class StopSettings(Settings):
    """What an addition must bring to be kept: more than ``gain``, in units of the objective.

    With ``interval`` the 95 % interval of the gain, paired over questions, must lie above 0 as well.
    """

    gain: Annotated[float, Field(ge=0)] = 0.0
    interval: bool = True


class AlignSettings(Settings):
    """One encoder alone before the language model, once for each encoder of a mixture (pre-alignment).

    ``stage`` is a stage of a recipe without ``name``; in its globs ``encoder.*`` stands for the encoder, and
    ``solo`` holds its projector. Encoders in ``skip`` stay as they are.
    """

    stage: Raw
    skip: tuple[str, ...] = ()

    @field_validator("stage")
    @classmethod
    def _is_solo(cls, raw: Raw) -> Raw:
        solo = raw.get("solo")
        if not isinstance(solo, dict) or "projector" not in solo or "encoder" in solo:
            raise ValueError(
                "`solo` must hold the `projector`, and no `encoder`: that is each of the trial's in turn"
            )
        if "name" in raw:
            raise ValueError("leave `name` out: it is align_ and the encoder's own name")
        return raw


class StartSettings(Settings):
    """What all trials begin with, trained once: the recipe's language model with all encoders of the pool.

    Every trial takes its language model, tokenizer and encoders, as published weights would be taken.
    ``settings`` are dotted keys of the recipe with the values they have in the start alone.
    """

    stages: Annotated[list[Raw], Field(min_length=1)]
    settings: dict[Text, Any] = Field(default_factory=dict)
    seed: Annotated[int, Field(ge=0)] = 0


class RangeSettings(Settings):
    """A continuous axis from ``low`` to ``high``.

    ``log`` draws its logarithm evenly, ``whole`` whole numbers.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high or (self.log and self.low <= 0):
            raise ValueError("`low` must be below `high`, and above 0 with `log`")
        return self


class Grid(Settings):
    """A search.

    ``recipe`` is the base: a path, seen from this file, or a shipped name. ``encoders`` is the pool by name;
    a mixture of them takes the place of the recipe's own encoders. ``axes`` are further keys of the recipe
    with the values each may have; the axis ``encoders`` holds lists of names. Every trial is run once for
    each of the ``seeds``. ``objective`` is a formula that is to be as large as possible. With ``verify`` so
    many trials are run again with nothing shared, to check what sharing saved. ``fidelity`` says where the
    search differs from the ``paper``.
    """

    name: Text
    paper: str = ""
    recipe: Text
    strategy: Raw
    objective: Text
    encoders: dict[str, Raw] = Field(default_factory=dict)
    start: StartSettings | None = None
    align: AlignSettings | None = None
    axes: dict[Text, Annotated[list[Any], Field(min_length=1)] | RangeSettings] = Field(default_factory=dict)
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = Field(
        default_factory=lambda: [0]
    )
    stop: StopSettings | None = StopSettings()
    verify: Annotated[int, Field(ge=0)] = 0
    fidelity: list[str] = Field(default_factory=list)

    @field_validator("encoders")
    @classmethod
    def _names_are_words(cls, pool: dict[str, Raw]) -> dict[str, Raw]:
        if bad := [name for name in pool if not _NAME.fullmatch(name)]:
            raise ValueError(f"{bad[0]!r}: names are small letters, digits, - and _")
        return pool

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed is given twice")
        return seeds

    @model_validator(mode="after")
    def _pool_is_there(self) -> Self:
        if (self.start or self.align) and not self.encoders:
            raise ValueError(
                "`start` and `align` are about the encoders of the pool; name them in `encoders`"
            )
        if self.align is not None and (strangers := sorted({*self.align.skip} - {*self.encoders})):
            raise ValueError(f"align.skip: no encoder is called {strangers[0]!r}: {', '.join(self.encoders)}")
        for mixture in self.mixtures():
            named = isinstance(mixture, list) and mixture and {*mixture} <= {*self.encoders}
            if not named or len({*mixture}) < len(mixture):
                raise ValueError(
                    f"axes.encoders: {mixture!r} is no list of different names of: {', '.join(self.encoders)}"
                )
        return self

    def mixtures(self) -> list[Any]:
        """The values of the axis ``encoders``; none where there is no such axis."""
        axis = self.axes.get(ENCODERS_AXIS, [])
        return axis if isinstance(axis, list) else [axis]
