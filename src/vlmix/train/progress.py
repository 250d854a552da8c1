"""Progress on the terminal: a live bar, or a plain line now and then where nobody watches."""

from __future__ import annotations

import resource
import sys
import time

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vlmix.train.records import StepRecord

_LINE_EVERY_SECONDS = 10.0
_MEMORY = 0.9  # weight of the past in the running averages


class ProgressLine:
    """Shows loss, speed, waiting for data, time left and memory of one stage.

    Loss and speed are running averages; the time left is the average step's times the steps to come.
    """

    def __init__(self, console: Console, stage: str, steps: int, first_step: int) -> None:
        self._console, self._stage = console, stage
        self._sums = {"loss": 0.0, "seconds": 0.0, "wait": 0.0, "tokens": 0.0, "samples": 0.0, "weight": 0.0}
        self._loss_weight = 0.0
        self._shown = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task(stage, total=steps, completed=first_step, figures="")
            self._bar.start()

    def step(self, record: StepRecord) -> None:
        """Show one more step."""
        self._add(record)
        figures = self._figures()
        if self._bar is not None:
            self._bar.update(self._task, completed=record.step, figures=figures)
        elif record.step == record.steps or time.monotonic() - self._shown >= _LINE_EVERY_SECONDS:
            self._shown = time.monotonic()
            left = (record.steps - record.step) * self._sums["seconds"] / self._sums["weight"]
            line = f"{self._stage} {record.step}/{record.steps}  {figures}  {clock(left)} left"
            self._console.print(line, highlight=False, soft_wrap=True)

    def sync(self) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Leave the bar as it is and stop drawing."""
        if self._bar is not None:
            self._bar.stop()

    def _add(self, record: StepRecord) -> None:
        new = {
            "seconds": record.seconds,
            "wait": record.wait_seconds,
            "tokens": record.tokens,
            "samples": record.samples,
            "weight": 1.0,
        }
        for key, value in new.items():
            self._sums[key] = self._sums[key] * _MEMORY + value
        if record.loss is not None:
            self._sums["loss"] = self._sums["loss"] * _MEMORY + record.loss
            self._loss_weight = self._loss_weight * _MEMORY + 1.0

    def _figures(self) -> str:
        sums = self._sums
        loss = sums["loss"] / self._loss_weight if self._loss_weight else float("nan")
        return (
            f"loss {loss:.4f}  {sums['tokens'] / sums['seconds']:,.0f} tokens/s  "
            f"{sums['samples'] / sums['seconds']:,.1f} samples/s  data {sums['wait'] / sums['seconds']:.0%}  "
            f"{memory_bytes() / 2**30:.1f} GiB"
        )


def memory_bytes() -> int:
    """The most memory used so far, in bytes: the accelerator's where there is one, else the process's."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def clock(seconds: float) -> str:
    """A length of time as minutes and seconds, with hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
