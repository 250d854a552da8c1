"""What a search cost, and what it would have cost had every trial made its own pieces. No torch.

A piece is an encoder aligned alone, or what a frozen encoder says of a stage's pictures. The trial that
makes it is charged its measured seconds; one that takes it is charged nothing. The naive cost charges every
trial that took a piece with the seconds that were measured when it was made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlmix.search.ledger import Entry


@dataclass(frozen=True, slots=True)
class Account:
    """Seconds of a search: as it ran, and naively; ``start``, which all begin with, counts once in both.

    ``pieces`` is how many were made, ``taken`` how often one was taken, wholly or in part.
    """

    reuse: float
    naive: float
    start: float
    pieces: int
    taken: int

    @property
    def ratio(self) -> float:
        """Cost with reuse over naive cost."""
        return self.reuse / self.naive if self.naive else 1.0


def naive_seconds(entry: Entry, made: Mapping[str, float]) -> float:
    """What a trial would have cost alone: its own seconds, and those of the pieces it took."""
    return entry.seconds.total + math.fsum(part * made.get(name, 0.0) for name, part in entry.used.items())


def account(entries: Sequence[Entry], made: Mapping[str, float], start: float) -> Account:
    """The costs of a search's trials; ``made`` are the seconds of all pieces of its folder.

    A piece that an earlier search in the same folder made is charged to this one, once.
    """
    own = {name for entry in entries for name in entry.made}
    used = {name for entry in entries for name in entry.used}
    inherited = math.fsum(made.get(name, 0.0) for name in used - own)
    return Account(
        reuse=start + inherited + math.fsum(entry.seconds.total for entry in entries),
        naive=start + math.fsum(naive_seconds(entry, made) for entry in entries),
        start=start,
        pieces=len(own | used),
        taken=sum(len(entry.used) for entry in entries),
    )
