"""The report's section on experts: what is shown of a recorder's counts, and where on a scale of 0..100."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmix.core.sample import Sample
from vlmix.evals.overlays import Example, examples_of
from vlmix.evals.verdict import RULES, LayerVerdict, Verdict, judge_routing
from vlmix.evals.window import RoutingWindow
from vlmix.moe.install import DECODER
from vlmix.moe.recorder import Note, RoutingRecorder
from vlmix.moe.recorder_tally import GROUPS, Tally

COLOURS = 8
"""Experts beyond take the colours once more; where that happens their numbers tell them apart."""
_TOP = 5
_WORDS = {"visual": "picture tokens", "text": "text tokens", "whole": "whole rows or pictures"}
_NUMBERED = 4.0  # least width in percent of a piece that has room for its number


@dataclass(frozen=True, slots=True)
class Piece:
    """One expert's part of a bar, in percent."""

    expert: int
    colour: int
    start: float
    width: float
    numbered: bool


@dataclass(frozen=True, slots=True)
class LoadBar:
    """The load of one layer's experts by one group of decisions."""

    label: str
    decisions: int
    pieces: Sequence[Piece]


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One expert layer of the chart."""

    name: str
    bars: Sequence[LoadBar]
    found: LayerVerdict


@dataclass(frozen=True, slots=True)
class PathRow:
    """A frequent path, in percent of all of its group; ``chance`` if every layer chose on its own."""

    steps: Sequence[str]
    share: float
    chance: float


@dataclass(frozen=True, slots=True)
class PathTable:
    """The most frequent paths of one group through one mixture; ``lost`` bounds what their shares lack."""

    label: str
    different: int
    lost: float
    rows: Sequence[PathRow]
    sets: Sequence[PathRow]


@dataclass(frozen=True, slots=True)
class MixtureView:
    """One mixture as the page shows it."""

    place: str
    rule: str
    takes_all: bool
    layers: Sequence[LayerRow]
    paths: Sequence[PathTable]
    pathless: str


@dataclass(frozen=True, slots=True)
class RoutingReport:
    """All that a report says about experts; ``seen`` is the recorder it comes from."""

    verdict: Verdict
    rules: str
    experts: int
    mixtures: Sequence[MixtureView]
    examples: Sequence[Example]
    seen: RoutingRecorder

    def to_json(self) -> Mapping[str, Any]:
        """The verdict and every count, for programs."""
        return {**self.seen.to_json(), "verdict": self.verdict.to_json()}


def routing_report(window: RoutingWindow, samples: Sequence[Sample]) -> RoutingReport:
    """What a window saw, with overlays over pictures of a few of ``samples``."""
    kept = window.show(samples)
    seen = window.recorder
    verdict = judge_routing(seen)
    found = {layer.layer: layer for layer in verdict.layers}
    return RoutingReport(
        verdict=verdict,
        rules=RULES,
        experts=max((note.experts for note in seen.notes.values()), default=0),
        mixtures=[_mixture(seen, number, notes, found) for number, notes in seen.mixtures().items()],
        examples=examples_of(window, kept),
        seen=seen,
    )


def _mixture(
    seen: RoutingRecorder, number: int, notes: Sequence[Note], found: Mapping[str, LayerVerdict]
) -> MixtureView:
    place = notes[0].place
    words = _WORDS if place == DECODER else {**_WORDS, "visual": "tokens"}
    layers = [
        LayerRow(note.name.removeprefix(f"{place}."), _bars(seen.tallies[note.name], words), found[note.name])
        for note in notes
    ]
    tables = [_table(seen, number, notes, group, words[group]) for group in GROUPS]
    first = seen.tallies[notes[0].name]
    shown = [table for table in tables if table is not None] if len(notes) > 1 else []
    return MixtureView(place, first.rule, first.takes_all, layers, shown, seen.pathless.get(number, ""))


def _bars(tally: Tally, words: Mapping[str, str]) -> list[LoadBar]:
    bars: list[LoadBar] = []
    for number, group in enumerate(GROUPS):
        named = ((words[group], tally.loads), (f"{words[group]}: size", tally.norms))
        bars += [
            LoadBar(label, int(tally.tokens[number]), _pieces(load_GE[number].tolist()))
            for label, load_GE in named
            if float(load_GE[number].sum())
        ]
    return bars


def _pieces(load_E: Sequence[float]) -> list[Piece]:
    total, start, pieces = math.fsum(load_E), 0.0, list[Piece]()
    for expert, load in enumerate(load_E):
        width = 100 * load / total
        pieces.append(Piece(expert, expert % COLOURS, round(start, 3), round(width, 3), width > _NUMBERED))
        start += width
    return pieces


def _table(
    seen: RoutingRecorder, mixture: int, notes: Sequence[Note], group: str, label: str
) -> PathTable | None:
    firsts, sets = seen.paths[mixture][group], seen.sets[mixture][group]
    if not firsts.total:
        return None
    tallies, at = [seen.tallies[note.name] for note in notes], GROUPS.index(group)

    def chance(path: str) -> float:
        steps = zip(path.split(">"), tallies, strict=True)
        return math.prod(
            float(tally.first[at, int(step)] if step != "-" else tally.tokens[at] - tally.first[at].sum())
            / float(tally.tokens[at])
            for step, tally in steps
        )

    rows = [
        PathRow(path.split(">"), 100 * count / firsts.total, 100 * chance(path))
        for path, count in firsts.top(_TOP)
    ]
    together = [PathRow(path.split(">"), 100 * count / sets.total, 0.0) for path, count in sets.top(_TOP)]
    return PathTable(label, len(firsts.counts), 100 * firsts.lost / firsts.total, rows, together)
