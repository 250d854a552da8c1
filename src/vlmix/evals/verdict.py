"""Is the work shared? One word for each expert layer, one sentence for the model, and what they rest on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

import torch

from vlmix.moe.recorder import Note, RoutingRecorder
from vlmix.moe.recorder_tally import GROUPS, UNUSED, Rule, Tally

State = Literal["balanced", "uneven", "unused experts", "collapsed", "too few to judge"]

UNEVEN: Final = 2.0
"""Within half and twice the even share the load is balanced: twice is the capacity that GShard and MoE-LLaVA
give experts in evaluation, so up to there nothing would be dropped; half is the same ratio downwards."""
COLLAPSED: Final = 0.25
"""Experts in effect run from k, where all tokens go one way, to E, where they are spread evenly.
A layer that is less than a quarter of the way up behaves almost like one without a choice."""
ENOUGH: Final = 32
"""Choices for each expert before a layer is judged: an expert with its even share would then look unused by
chance once in ten billion times (Poisson, at most 3 where 32 are expected)."""

RULES: Final = (
    f"A layer is balanced if every expert does between {1 / UNEVEN:g} and {UNEVEN:g} times its even share of "
    f"the work, and uneven beyond that. An expert below {UNUSED:g} of its even share is unused. A layer is "
    "collapsed if its effective number of experts, exp(entropy of the load), is less than "
    f"{COLLAPSED:.0%} of the way from k, where all tokens go one way, to E, where they are spread evenly. "
    f"Layers with fewer than {ENOUGH} choices for each expert are not judged."
)
_WORST_FIRST: Final[tuple[State, ...]] = ("collapsed", "unused experts", "uneven", "balanced")


@dataclass(frozen=True, slots=True)
class LayerVerdict:
    """One layer judged by the load of its experts, visual, text and whole decisions together.

    ``effective`` is exp(entropy of the load); ``least`` and ``most`` are shares of the load; ``dropped`` is
    the share of choices an expert had no place for, ``unserved`` that of decisions no expert served.
    ``certainty`` is 1 where the router gives one expert everything and 0 where it is undecided. ``gap`` is
    the share of the load that would have to move for text to be routed as pictures are, None without both.
    """

    layer: str
    mixture: int
    place: str
    experts: int
    k: int
    rule: Rule
    state: State
    decisions: int
    effective: float
    least: float
    most: float
    unused: tuple[int, ...]
    dropped: float
    unserved: float
    certainty: float
    gap: float | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """The whole model: its worst layers decide."""

    state: State
    sentence: str
    layers: tuple[LayerVerdict, ...]

    def to_json(self) -> Mapping[str, Any]:
        """For programs, with the thresholds it rests on."""
        limits = {"unused": UNUSED, "uneven": UNEVEN, "collapsed": COLLAPSED, "enough": ENOUGH}
        return {**asdict(self), "thresholds": limits, "rules": RULES}


def judge_routing(recorder: RoutingRecorder) -> Verdict:
    """Judge what a recorder saw."""
    layers = tuple(_layer(note, recorder.tallies[name]) for name, note in recorder.notes.items())
    judged = [layer for layer in layers if layer.state != "too few to judge"]
    if not judged:
        return Verdict(
            "too few to judge",
            f"Too few to judge: no layer saw {ENOUGH} choices for each of its experts. Ask more questions.",
            layers,
        )
    state: State = next(state for state in _WORST_FIRST if any(layer.state == state for layer in judged))
    return Verdict(state, _sentence(state, judged, len(layers)), layers)


def _layer(note: Note, tally: Tally) -> LayerVerdict:
    load_GE = tally.loads
    load_E, decisions = load_GE.sum(0), int(tally.tokens.sum())
    share_E = load_E / load_E.sum().clamp_min(1e-12)
    effective = float(torch.special.entr(share_E).sum().exp())
    unused = tuple(i for i, share in enumerate(share_E.tolist()) if share * note.experts < UNUSED)
    entropy = float(tally.entropy.sum()) / max(decisions, 1)
    ceiling = float(torch.tensor(float(note.experts)).log())
    return LayerVerdict(
        layer=note.name,
        mixture=note.mixture,
        place=note.place,
        experts=note.experts,
        k=note.k,
        rule=tally.rule,
        state=_state(_floor(note, tally), share_E.tolist(), effective, unused, float(load_E.sum())),
        decisions=decisions,
        effective=effective,
        least=float(share_E.min()),
        most=float(share_E.max()),
        unused=unused,
        dropped=float(tally.dropped.sum()) / max(float(tally.choices.sum()), 1.0),
        unserved=float(tally.unserved.sum()) / max(decisions, 1),
        certainty=1 - entropy / ceiling if ceiling else 1.0,
        gap=_gap(load_GE),
    )


def _floor(note: Note, tally: Tally) -> int:
    """The least number of experts that can be in use: all k of them, or one where weights are the load."""
    return 1 if tally.rule == "all mix" or tally.takes_all else note.k


def _state(floor: int, shares: list[float], effective: float, unused: tuple[int, ...], load: float) -> State:
    experts = len(shares)
    if load < ENOUGH * experts:
        return "too few to judge"
    if experts > floor and (effective - floor) / (experts - floor) < COLLAPSED:
        return "collapsed"
    if unused:
        return "unused experts"
    even = 1 / experts
    return "balanced" if min(shares) >= even / UNEVEN and max(shares) <= even * UNEVEN else "uneven"


def _gap(load_GE: torch.Tensor) -> float | None:
    visual_E, text_E = (load_GE[GROUPS.index(group)] for group in ("visual", "text"))
    if not float(visual_E.sum()) or not float(text_E.sum()):
        return None
    return float((visual_E / visual_E.sum() - text_E / text_E.sum()).abs().sum()) / 2


def _sentence(state: State, judged: list[LayerVerdict], layers: int) -> str:
    same = [layer for layer in judged if layer.state == state]
    worst = min(same, key=lambda layer: (layer.effective - layer.k) / layer.experts)
    of = f"{len(same)} of {layers} expert layers"
    if state == "collapsed":
        what = f"{of} send nearly everything one way; worst is {worst.layer}, {_used(worst)}"
    elif state == "unused experts":
        count = sum(len(layer.unused) for layer in same)
        what = f"{count} experts in {of} hardly ever work; worst is {worst.layer}, {_used(worst)}"
    elif state == "uneven":
        what = f"{of} load some experts far more than others; worst is {worst.layer}, {_used(worst)}"
    else:
        what = f"in {of} every expert does its part; the least even is {worst.layer}, {_used(worst)}"
    return f"{state.capitalize()}: {what}."


def _used(layer: LayerVerdict) -> str:
    return f"which uses {layer.effective:.1f} of {layer.experts} experts in effect"
