"""Signs of life: a process that is stopped or gone is noticed by its neighbour, whatever that waits for."""

from __future__ import annotations

import os
import sys
import threading
import time
from types import TracebackType
from typing import Self

from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

_LAST, _OVER = "last", "over"


class Heartbeat:
    """Within the block this process gives signs of life and watches those of the process after it.

    Where none came for ``timeout_s`` seconds, or the store of all processes is gone, this process ends at
    once: its main thread may be waiting inside an exchange that nothing else can end. It tells all others,
    who end too, however many they are. So does a process that leaves the block with an error; to say what
    they themselves know the others then have ``timeout_s`` seconds.
    """

    def __init__(self, store: Store, rank: int, world: int, timeout_s: float) -> None:
        self._store, self._rank, self._watched = store, rank, (rank + 1) % world
        self._timeout_s, self._pause_s = timeout_s, min(1.0, timeout_s / 8)
        self._over, self._failed = threading.Event(), False
        self._thread = threading.Thread(target=self._watch, name="vlmix-heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._store.set(_key(self._rank), "0")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Say that this process leaves of its own accord, or that something failed here."""
        self._failed = error is not None
        self._over.set()
        self._thread.join(self._timeout_s)

    def _watch(self) -> None:
        count, seen, told, since, before = 0, "", "", time.monotonic(), time.monotonic()
        try:
            while not self._over.wait(self._pause_s):
                count += 1
                self._store.set(_key(self._rank), str(count))
                now, sign, told = time.monotonic(), self._said(_key(self._watched)), self._said(_OVER)
                # One that was itself stopped for a while cannot tell how long others were silent.
                if (sign != seen and not told) or now - before > self._timeout_s / 2:
                    seen, since = sign, now
                before = now
                if (told or sign != _LAST) and now - since > self._timeout_s:
                    silent = f"process {self._watched} gave no sign of life for {self._timeout_s:g} s"
                    self._end(told or silent)
            if self._failed and not told:
                self._store.set(_OVER, f"process {self._rank} failed, and says why")
            self._store.set(_key(self._rank), _LAST)
        except RuntimeError:
            if not self._over.is_set():
                _end("the meeting place of all processes is gone, so one of them has ended")

    def _said(self, key: str) -> str:
        # A process joins before it beats; asking for a key that is not there would wait.
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _end(self, what: str) -> None:
        self._store.set(_OVER, what)
        _end(what)


def remedy(what: str) -> str:
    """The message of a run that other processes ended."""
    return f"{what}. The last checkpoint is intact: start all processes again with --resume"


def _end(what: str) -> None:
    sys.stderr.write(f"vlmix: {remedy(what)}\n")
    sys.stderr.flush()
    os._exit(1)


def _key(rank: int) -> str:
    return f"alive/{rank}"
