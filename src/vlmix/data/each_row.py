"""One piece of work for every row of a set, in order, in this process or in several."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, Final, TypeVar

from vlmix.core.errors import VlmixError

_ROWS: Final = 32  # given to a process at once
_AHEAD: Final = 4  # such pieces a process, so that results nobody has taken yet stay few
_held: list[Callable[[int], Any]] = []  # the work, in a worker process only
T = TypeVar("T")


def each_row(work: Callable[[int], T], rows: int, workers: int = 0, first: int = 0) -> Iterator[T]:
    """What ``work`` gives for rows ``first``, … up to ``rows``.

    With ``workers`` above 0 it is pickled once for each process.

    Raises:
        VlmixError: if a process was killed.

    """
    if not workers:
        yield from map(work, range(first, rows))
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _hold, (work,))
    pieces = (range(start, min(start + _ROWS, rows)) for start in range(first, rows, _ROWS))
    waiting = deque[Future[list[T]]]()
    try:
        for piece in pieces:
            waiting.append(pool.submit(_piece, piece))
            if len(waiting) >= _AHEAD * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        raise VlmixError(
            "a worker process was killed, most often for want of memory. Try again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _hold(work: Callable[[int], Any]) -> None:
    _held.append(work)


def _piece(rows: range) -> list[Any]:
    return [_held[0](row) for row in rows]
