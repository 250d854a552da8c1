"""Which rows a step sees: a pure function of (seed, epoch, step), so resuming needs integers only."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from vlmix.core.errors import RecipeError

_MIX, _ROWS = 0, 1  # two families of permutations that must never share a seed


@dataclass(frozen=True, slots=True)
class RowId:
    """One row of the mix: which source, and which of its rows."""

    source: int
    row: int


@dataclass(frozen=True)
class DataOrder:
    """The order in which a stage draws from its sources.

    ``sizes`` are the sources' rows; ``weights`` their shares of the draws, ``None`` meaning as many as the
    source has rows. An epoch is as many draws as there are rows in all. A source is dealt whole,
    newly shuffled each time, before any row of it comes again; without weights every row comes exactly
    once per epoch. ``draws`` is the length of the stage; its last step may be smaller than ``batch_size``.
    """

    sizes: tuple[int, ...]
    weights: tuple[float | None, ...]
    batch_size: int
    draws: int
    seed: tuple[int, ...]

    @staticmethod
    def plan(
        sizes: Sequence[int],
        weights: Sequence[float | None],
        batch_size: int,
        seed: tuple[int, ...],
        *,
        steps: int | None,
        epochs: float | None,
    ) -> DataOrder:
        """The order of a stage that lasts ``steps`` steps or, where that is ``None``, ``epochs`` epochs.

        Raises:
            RecipeError: if a source is empty, or a share too small for a single row.

        """
        if empty := [str(i) for i, size in enumerate(sizes) if size == 0]:
            raise RecipeError(f"data.{', data.'.join(empty)}: this source has no rows")
        quotas = _quotas(tuple(sizes), tuple(weights))
        if 0 in quotas:
            raise RecipeError(
                f"data.{quotas.index(0)}: its weight gives it none of the {sum(sizes)} draws of an epoch; "
                "raise the weight or remove the source"
            )
        draws = steps * batch_size if steps is not None else math.ceil((epochs or 0) * sum(sizes) - 1e-9)
        return DataOrder(tuple(sizes), tuple(weights), batch_size, draws, seed)

    @property
    def steps(self) -> int:
        """Optimizer steps of the stage."""
        return math.ceil(self.draws / self.batch_size)

    @property
    def fingerprint(self) -> str:
        """A digest of everything the order depends on, for noticing that the data changed."""
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def rows_for_step(self, step: int) -> list[RowId]:
        """The rows of optimizer step ``step``, counted from 0; the same on every call."""
        first = step * self.batch_size
        return [self._row(draw) for draw in range(first, min(first + self.batch_size, self.draws))]

    def _row(self, draw: int) -> RowId:
        quotas = _quotas(self.sizes, self.weights)
        epoch, position = divmod(draw, sum(self.sizes))
        deal = _mix(quotas, self.seed, epoch)
        source = int(deal.sources[position])
        count = epoch * quotas[source] + int(deal.ranks[position])
        deck, place = divmod(count, self.sizes[source])
        return RowId(source, int(_permutation(self.sizes[source], (*self.seed, _ROWS, source, deck))[place]))


def group_weights(groups: Sequence[str], sizes: Sequence[int]) -> list[float | None]:
    """Weights that give every group the same share, divided among its sources by their rows.

    ``None`` for every source where none names a group. Paper: MoME, arXiv:2407.12709, section 4.1.
    """
    if not any(groups):
        return [None] * len(sizes)
    rows = {name: sum(size for of, size in zip(groups, sizes, strict=True) if of == name) for name in groups}
    return [size / max(rows[name], 1) for name, size in zip(groups, sizes, strict=True)]


@dataclass(frozen=True, slots=True)
class _Deal:
    """For each position of an epoch: the source it draws from, and how often that source came before."""

    sources: np.ndarray
    ranks: np.ndarray


def _quotas(sizes: tuple[int, ...], weights: tuple[float | None, ...]) -> tuple[int, ...]:
    """Draws from each source per epoch, by largest remainder; their sum is the sum of ``sizes``."""
    parts = [float(size) if weight is None else weight for size, weight in zip(sizes, weights, strict=True)]
    total, whole = sum(sizes), sum(parts)
    exact = [part / whole * total for part in parts]
    quotas = [math.floor(share + 1e-9) for share in exact]
    order = sorted(range(len(sizes)), key=lambda i: (quotas[i] - exact[i], i))
    for i in order[: total - sum(quotas)]:
        quotas[i] += 1
    return tuple(quotas)


@lru_cache(maxsize=4)
def _mix(quotas: tuple[int, ...], seed: tuple[int, ...], epoch: int) -> _Deal:
    order = _permutation(sum(quotas), (*seed, _MIX, 0, epoch))
    sources = np.repeat(np.arange(len(quotas), dtype=np.int32), quotas)[order]
    ranks = np.empty(len(sources), dtype=np.int64)
    for source, quota in enumerate(quotas):
        ranks[sources == source] = np.arange(quota)
    return _Deal(sources, ranks)


@lru_cache(maxsize=64)
def _permutation(size: int, key: tuple[int, ...]) -> np.ndarray:
    """A permutation that depends on ``key`` alone.

    Sorting a generator's raw output is used because numpy keeps that stable across versions, which it
    does not promise for ``permutation``.
    """
    return np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(size), kind="stable")
