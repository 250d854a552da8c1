"""Which samples share a micro-batch, and which of a window's samples share a step: from lengths alone.

Pure functions of the samples' lengths in tokens, visual ones included, so that every rank plans the same
and no number of ranks changes what runs together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlmix.core.batching import BatchingSettings


@dataclass(frozen=True, slots=True)
class Shape:
    """What a plan knows of a sample: its tokens, visual ones included, and its pictures."""

    tokens: int
    pictures: int


def plan_micro_batches(
    shapes: Sequence[Shape], settings: BatchingSettings, size: int
) -> tuple[tuple[int, ...], ...]:
    """The places in ``shapes`` of each micro-batch's samples; ``size`` counts where no budget does."""
    if not settings.group:
        return tuple(_cut(shapes, range(len(shapes)), settings, size))
    order = _by_length(shapes)
    kinds = [[at for at in order if bool(shapes[at].pictures) == pictured] for pictured in (False, True)]
    return tuple(batch for kind in kinds for batch in _cut(shapes, kind, settings, size))


def deal_window(
    shapes: Sequence[Shape], batch_size: int, seed: tuple[int, ...]
) -> tuple[tuple[int, ...], ...]:
    """The places in ``shapes`` of each step's samples, of like length in each; the steps are shuffled."""
    order = _by_length(shapes)
    steps = [tuple(sorted(order[i : i + batch_size])) for i in range(0, len(order), batch_size)]
    # The generator's raw output, as in ``order``: numpy keeps it stable across versions.
    keys = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(len(steps))
    return tuple(steps[at] for at in np.argsort(keys, kind="stable"))


def _by_length(shapes: Sequence[Shape]) -> list[int]:
    return sorted(range(len(shapes)), key=lambda at: (shapes[at].pictures > 0, shapes[at].tokens, at))


def _cut(
    shapes: Sequence[Shape], order: Sequence[int], settings: BatchingSettings, size: int
) -> list[tuple[int, ...]]:
    if settings.tokens is None:
        return [tuple(order[i : i + size]) for i in range(0, len(order), size)]
    if settings.pack:
        return _filled(shapes, order, settings.tokens)
    batches: list[list[int]] = []
    longest = 0
    for at in order:
        longest = max(longest, shapes[at].tokens)
        if not batches or (len(batches[-1]) + 1) * longest > settings.tokens:
            batches.append([])
            longest = shapes[at].tokens
        batches[-1].append(at)
    return [tuple(batch) for batch in batches]


def _filled(shapes: Sequence[Shape], order: Sequence[int], budget: int) -> list[tuple[int, ...]]:
    """First fit, longest first: rows of at most ``budget`` tokens, few of them far from full."""
    rows: list[tuple[int, list[int]]] = []
    for at in sorted(order, key=lambda at: (-shapes[at].tokens, at)):
        length = shapes[at].tokens
        fit = next((i for i, (free, _) in enumerate(rows) if length <= free), None)
        if fit is None:
            rows.append((budget - length, [at]))
        else:
            free, members = rows[fit]
            members.append(at)
            rows[fit] = (free - length, members)
    return [tuple(sorted(members)) for _, members in rows]
