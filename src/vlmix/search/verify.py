"""Trials run once more with nothing shared: is the naive cost what was said, and the model the same?"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from vlmix.search.compose import ALIGNED, CHECKS, FEATURES, SHARED, Composer
from vlmix.search.costs import naive_seconds
from vlmix.search.ledger import Entry
from vlmix.search.points import Point
from vlmix.search.trial import run_trial


@dataclass(frozen=True, slots=True)
class Check:
    """A trial that was run alone: the seconds said and measured, and whether its figures are the same."""

    key: str
    label: str
    reused: float
    said: float
    measured: float
    same: bool


def verified(
    composer: Composer,
    best: Point,
    entries: Sequence[Entry],
    made: Mapping[str, float],
    out: Path,
    say: Callable[[str], None],
) -> list[Check]:
    """Run as many trials as the grid says again, each with a store of its own below ``out``.

    Those of the best choice come first, then those that saved most.

    Raises:
        VlmixError: as ``run_trial``.

    """
    whole = [entry for entry in entries if not entry.error and entry.used]
    whole.sort(key=lambda entry: (_point(entry) != best, entry.seconds.total - naive_seconds(entry, made)))
    return [_check(composer, entry, made, out, say) for entry in whole[: composer.grid.verify]]


def _check(
    composer: Composer,
    entry: Entry,
    made: Mapping[str, float],
    out: Path,
    say: Callable[[str], None],
) -> Check:
    point = _point(entry)
    alone = (out / CHECKS / entry.key / "run").resolve()
    shared = composer.recipe(point, entry.seed, (out / SHARED).resolve())
    kept = shared.feature_cache.model_copy(update={"folder": str(alone.parent / FEATURES)})
    recipe = shared.model_copy(update={"results": str(alone.parent / ALIGNED), "feature_cache": kept})
    if not alone.exists():
        say(f"  once more with nothing shared: {point.label}, seed {entry.seed}")
    alone.parent.mkdir(parents=True, exist_ok=True)
    with (alone.parent / "log.txt").open("a", encoding="utf-8") as words:
        again = run_trial(entry.key, recipe, alone, {}, Console(file=words, width=160))
    return Check(
        key=entry.key,
        label=f"{point.label}, seed {entry.seed}",
        reused=entry.seconds.total,
        said=naive_seconds(entry, made),
        measured=again.seconds.total,
        same=again.figures == entry.figures,
    )


def _point(entry: Entry) -> Point:
    told = tuple((key, json.dumps(value, sort_keys=True)) for key, value in entry.settings.items())
    return Point(entry.encoders, told)
