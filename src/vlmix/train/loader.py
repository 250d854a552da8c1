"""The samples of a step, read, encoded and collated; bad rows are reported, never replaced.

What a step contains depends on its number alone: worker threads only prepare the next step while this one
trains, and their number changes nothing but the waiting time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from vlmix.core.errors import ContextLengthError, ImageCountError, ImageError, SampleError
from vlmix.core.interfaces import Source
from vlmix.core.sample import Sample
from vlmix.data.ledger import Ledger
from vlmix.train.order import DataOrder, RowId

BAD_ROW = (SampleError, ImageError, ContextLengthError, ImageCountError)
IGNORED = -100


@dataclass(frozen=True, slots=True)
class NamedSource:
    """A source with the name that the ledger and messages give it."""

    name: str
    source: Source


@dataclass(frozen=True, slots=True)
class Encoder:
    """How samples become tensors: one sample, its pictures opened, and several to a micro-batch."""

    encode: Callable[[Sample], Any]
    collate: Callable[[Sequence[Any]], Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True)
class StepData:
    """Everything one optimizer step trains on.

    ``supervised_tokens`` are those the loss is averaged over; ``wait_seconds`` is how long the loop waited.
    """

    micro_batches: tuple[Mapping[str, Tensor], ...]
    sample_ids: tuple[str, ...]
    quarantined: int
    tokens: int
    supervised_tokens: int
    wait_seconds: float


@dataclass(frozen=True, slots=True)
class _Read:
    """One row as read: its encoding, or why it cannot be used."""

    row: RowId
    sample_id: str
    encoded: Any = None
    reason: str = ""
    line: int = 0


class Loader:
    """Gives the data of any step, preparing the following one on ``workers`` threads."""

    def __init__(
        self,
        order: DataOrder,
        sources: Sequence[NamedSource],
        encoder: Encoder,
        *,
        micro_batch_size: int,
        workers: int,
    ) -> None:
        self.order, self.sources, self.encoder = order, sources, encoder
        self.micro_batch_size = micro_batch_size
        self._pool = ThreadPoolExecutor(workers, "vlmix-data") if workers else None
        self._ahead: dict[int, list[Future[_Read]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def step(self, step: int, ledger: Ledger) -> StepData:
        """Read step ``step`` and enter its good and bad rows in the ledger.

        Raises:
            DataError: if too many rows are bad.

        """
        start = time.perf_counter()
        rows = self._rows(step)
        good = [row for row in rows if not row.reason]
        size = self.micro_batch_size
        encoded = [row.encoded for row in good]
        batches = tuple(self.encoder.collate(encoded[i : i + size]) for i in range(0, len(encoded), size))
        waited = time.perf_counter() - start
        for row in rows:
            self._account(row, ledger)
        return StepData(
            micro_batches=batches,
            sample_ids=tuple(row.sample_id for row in good),
            quarantined=len(rows) - len(good),
            tokens=sum(int(batch["attention_mask"].sum()) for batch in batches),
            supervised_tokens=sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches),
            wait_seconds=waited,
        )

    def _rows(self, step: int) -> list[_Read]:
        if self._pool is None:
            return [self._read(row) for row in self.order.rows_for_step(step)]
        for wanted in (step, step + 1):
            if wanted not in self._ahead:
                rows = self.order.rows_for_step(wanted)
                self._ahead[wanted] = [self._pool.submit(self._read, row) for row in rows]
        return [future.result() for future in self._ahead.pop(step)]

    def _read(self, row: RowId) -> _Read:
        source = self.sources[row.source].source
        sample_id = ""
        try:
            sample = source[row.row]
            sample_id = sample.id
            return _Read(row, sample_id, self.encoder.encode(sample))
        except BAD_ROW as error:
            if isinstance(error, SampleError) and error.sample_id:
                sample_id = error.sample_id
            return _Read(row, sample_id, reason=str(error), line=source.line(row.row))

    def _account(self, read: _Read, ledger: Ledger) -> None:
        if read.reason:
            name = self.sources[read.row.source].name
            ledger.quarantine((name, read.row.row), read.line, read.sample_id, read.reason)
        else:
            ledger.used += 1
