"""Settings of how a stage learns: schedule, averages of weights, what to do about spikes. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from vlmix.core.settings import Settings

Share = Annotated[float, Field(ge=0, le=1)]


class ScheduleSettings(Settings):
    """How learning rates rise during warm-up and fall after it, down to ``floor`` times their peak.

    Warm-up is ``warmup_steps`` where given, else ``warmup_share`` of the stage's steps. ``wsd`` stays at the
    peak after it and falls over the last ``decay_share`` of the steps, in the shape that ``decay`` names.
    Paper: Hägele et al., arXiv:2405.18392, section 2 (1 - sqrt is theirs).
    """

    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_share: Share = 0.03
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    decay_share: Share = 0.2
    decay: Literal["linear", "cosine", "sqrt"] = "sqrt"
    floor: Share = 0.0


class EmaSettings(Settings):
    """An exponential average of the weights that train, which they are set to when the stage ends.

    With ``warmup`` the average forgets faster while it is young: update n (from 0) keeps at most
    (1 + n) / (10 + n) of it.
    """

    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    warmup: bool = True


class SpikeSettings(Settings):
    """What is done before an update whose loss or gradient norm stands out, and where one is not finite.

    A value stands out if it is above the median of the last ``window`` accepted ones by more than
    ``deviations`` robust standard deviations (1.4826 times their median absolute deviation), and above
    ``factor`` times it. There is no judgement before ``least`` values. ``skip`` leaves the weights as they
    are and goes on, at most ``in_a_row`` times one after another; ``stop`` ends the run.
    """

    action: Literal["skip", "stop"] = "skip"
    non_finite: Literal["skip", "stop"] = "stop"
    watch: Annotated[tuple[Literal["loss", "grad_norm"], ...], Field(min_length=1)] = ("loss", "grad_norm")
    window: Annotated[int, Field(ge=3)] = 128
    least: Annotated[int, Field(ge=3)] = 32
    deviations: PositiveFloat = 8.0
    factor: Annotated[float, Field(ge=1)] = 2.0
    in_a_row: PositiveInt = 5
