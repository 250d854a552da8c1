"""What the processes read in a step, told to all, so that each counts the rows of all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from vlmix.train.parallel.processes import Processes
from vlmix.train.reading import Prepared


@dataclass(frozen=True, slots=True)
class ToldRow:
    """One row of a source, by the source's place in the mix; ``reason`` is why it cannot be used."""

    source: int
    row: int
    line: int
    sample_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Told:
    """A step as it is counted; ``samples`` are the ids that each process trains on, in their order."""

    rows: Sequence[ToldRow]
    samples: Sequence[Sequence[str]]
    tokens: int
    positions: int
    supervised_tokens: int


def told_of(prepared: Prepared) -> Told:
    """What this process read."""
    rows = [ToldRow(r.row.source, r.row.row, r.line, r.sample_id, r.reason) for r in prepared.rows]
    samples = [tuple(row.sample_id for row in rows if not row.reason)]
    return Told(rows, samples, prepared.tokens, prepared.positions, prepared.supervised_tokens)


def everywhere(processes: Processes, mine: Told) -> Told:
    """What all processes read, in their order."""
    if processes.world == 1:
        return mine
    found = [json.loads(text) for text in processes.gather(json.dumps(asdict(mine)))]
    return Told(
        [ToldRow(**row) for told in found for row in told["rows"]],
        [tuple(ids) for told in found for ids in told["samples"]],
        sum(told["tokens"] for told in found),
        sum(told["positions"] for told in found),
        sum(told["supervised_tokens"] for told in found),
    )
