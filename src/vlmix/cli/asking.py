"""Progress of judging: a live bar with the time left, or a line now and then where nobody watches."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from vlmix.evals.run import Progress as Told
from vlmix.train.progress import clock

_LINE_EVERY_SECONDS = 10.0


class AskingProgress:
    """Shows how many questions are answered; ``ready`` counts answers before their turn in the order comes.

    ``asked`` counts all answers, ``kept`` those of them that were there before.
    """

    def __init__(self, console: Console) -> None:
        self._console, self._begun = console, time.monotonic()
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._row: TaskID | None = None
        self._name, self._total, self._ready, self._done, self._there = "", 0, 0, 0, 0
        self._started = self._shown = self._begun
        self.asked = self.kept = 0

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the bars as they are and stop drawing."""
        self._bars.stop()

    def of(self, name: str) -> Told:
        """What `evaluate` calls for the benchmark ``name``."""

        def told(what: str, done: int, total: int) -> None:
            if done == 0:
                self._begin(f"{name}: {what}", total)
            self._show(done)

        return told

    def there(self, count: int, total: int) -> None:
        """Tell that answers to ``count`` of ``total`` questions were kept from before."""
        self.kept += count
        self._there += count
        words = f"{self._name}: {count} of {total} answers are there from before"
        self._console.print(words, highlight=False, markup=False, soft_wrap=True)

    def ready(self, count: int) -> None:
        """Tell of ``count`` more answers."""
        self._ready += count
        self._show(self._ready)

    def summary(self) -> str:
        """How many questions were asked, in what time."""
        seconds = time.monotonic() - self._begun
        kept = f", {self.kept} answers were there from before" if self.kept else ""
        new = self.asked - self.kept
        return (
            f"asked {new:,} questions in {clock(seconds)}: {new / max(seconds, 1e-9):,.1f} questions/s{kept}"
        )

    def _begin(self, name: str, total: int) -> None:
        self._name, self._total, self._ready, self._done, self._there = name, total, 0, 0, 0
        self._started = self._shown = time.monotonic()
        self._row = self._bars.add_task(name, total=total)

    def _show(self, done: int) -> None:
        """Show ``done`` answers, unless more were shown already."""
        if done <= self._done or self._row is None:
            return
        new = done - self._done
        self._done = done
        self._bars.update(self._row, completed=done)
        self.asked += new
        now = time.monotonic()
        if not self._console.is_terminal and (
            done == self._total or now - self._shown >= _LINE_EVERY_SECONDS
        ):
            self._shown = now
            each = max(now - self._started, 1e-9) / max(done - self._there, 1)
            left = (self._total - done) * each
            line = f"{self._name} {done}/{self._total}  {1 / each:,.1f} questions/s"
            self._console.print(f"{line}  {clock(left)} left", highlight=False, soft_wrap=True)
