"""Feeds the training loop: the data of each step in turn, prepared ahead by worker processes.

What a step contains depends on its number alone (``reading``): workers change nothing but the waiting time.
"""

from __future__ import annotations

import ctypes
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlmix.core.errors import DataError, VlmixError
from vlmix.data.ledger import Ledger
from vlmix.train.parallel.processes import Processes
from vlmix.train.parallel.tellings import everywhere, told_of
from vlmix.train.reading import Parcel, Prepared, StepReader, parcel

_AHEAD = 2  # steps that each worker prepares beforehand
_MMAP_THRESHOLD, _LARGE = -3, 2**20  # of glibc's mallopt; bytes


@dataclass(frozen=True, slots=True)
class StepData:
    """Everything one rank trains on in an optimizer step; micro-batches and ``pictured`` as in ``Prepared``.

    The rest is of all ranks together: the ids of ``samples``, one sequence for each rank;
    ``supervised_tokens``, which the loss is divided by; ``positions``, which count padding too.
    ``wait_seconds`` is how long the loop waited.
    """

    micro_batches: tuple[Mapping[str, Tensor] | None, ...]
    pictured: tuple[bool, ...]
    samples: tuple[Sequence[str], ...]
    quarantined: int
    tokens: int
    positions: int
    supervised_tokens: int
    wait_seconds: float

    @property
    def sample_ids(self) -> tuple[str, ...]:
        """The samples of all ranks."""
        return tuple(sample for samples in self.samples for sample in samples)


class Loader:
    """Gives the data of a stage's steps in turn.

    A worker that gives nothing for ``timeout`` seconds ends the run; 0 waits for ever.
    """

    def __init__(
        self, reader: StepReader, *, workers: int, timeout: float, processes: Processes | None = None
    ) -> None:
        self.reader, self.workers, self.timeout = reader, workers, timeout
        self.processes = processes or Processes()
        self._steps: Iterator[Parcel] | None = None
        self._next = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the workers."""
        self._steps = None

    @property
    def steps(self) -> int:
        """Optimizer steps of the stage."""
        return self.reader.order.steps

    def step(self, step: int, ledger: Ledger) -> StepData:
        """Read step ``step`` and enter the good and bad rows of all ranks in the ledger.

        Raises:
            DataError: if too many rows are bad.
            VlmixError: if a worker hangs or was killed.

        """
        start = time.perf_counter()
        prepared = self._prepared(step)
        told = everywhere(self.processes, told_of(prepared))
        waited = time.perf_counter() - start
        for row in told.rows:
            if row.reason:
                name = self.reader.sources[row.source].name
                ledger.quarantine((name, row.row), row.line, row.sample_id, row.reason)
            else:
                ledger.used += 1
        return StepData(
            micro_batches=prepared.micro_batches,
            pictured=prepared.pictured,
            samples=tuple(told.samples),
            quarantined=sum(bool(row.reason) for row in told.rows),
            tokens=told.tokens,
            positions=told.positions,
            supervised_tokens=told.supervised_tokens,
            wait_seconds=waited,
        )

    def _prepared(self, step: int) -> Prepared:
        if not self.workers:
            return self.reader[step]
        if self._steps is None or step != self._next:
            self._steps = self._begin(step)
        try:
            prepared = next(self._steps).opened()
        except RuntimeError as error:
            self._steps = None
            raise VlmixError(_fault(error, self.timeout)) from None
        self._next = step + 1
        if prepared.problem:
            raise DataError(prepared.problem)
        return prepared

    def _begin(self, step: int) -> Iterator[Parcel]:
        steps = DataLoader(
            _Parcels(self.reader),
            batch_size=None,
            sampler=range(step, self.steps),
            num_workers=self.workers,
            worker_init_fn=_begin_worker,
            timeout=self.timeout,
            prefetch_factor=_AHEAD,
            # Its own would be drawn from the stream that dropout draws from.
            generator=torch.Generator(),
        )
        return iter(steps)


class _Parcels(Dataset[Parcel]):
    """A reader's steps as they travel between processes."""

    def __init__(self, reader: StepReader) -> None:
        self._reader = reader

    def __getitem__(self, index: int) -> Parcel:
        return parcel(self._reader, index)


def _begin_worker(number: int) -> None:
    """Ctrl-C is the parent's to handle; decoding is parallel across workers, not inside one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    _give_back_large_blocks()


def _give_back_large_blocks() -> None:
    """Have every picture's pixels go back to the system when they are freed.

    By itself glibc soon keeps blocks of up to 32 MB in its heap, where a small one behind them holds them for
    good: a worker grew to five times its size over 8000 pictures.
    """
    try:
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE)
    except (AttributeError, OSError, TypeError):
        return  # another C library


def _fault(error: RuntimeError, timeout: float) -> str:
    text = str(error)
    remedy = "The last checkpoint is intact; continue with --resume, or set `workers: 0` to see what it reads"
    if "timed out" in text:
        return (
            f"the data workers gave nothing for {timeout:g} s: one hangs, on a disk or network that does not "
            f"answer. {remedy}, or raise `worker_timeout`"
        )
    if "exited unexpectedly" in text or "is killed" in text:
        return f"a data worker was ended from outside, often for lack of memory. {remedy}"
    return f"a data worker failed: {text.strip().splitlines()[-1]}. {remedy}"
