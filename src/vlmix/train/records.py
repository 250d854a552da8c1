"""What a run writes down while it trains: a JSON line per step, TensorBoard events, a PNG of the curves."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from vlmix.core.files import storage_errors, write_bytes, write_text

_SOMETIMES = frozenset(("balance", "experts", "reused", "sample_ids", "skipped"))


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step. ``step`` counts from 1 in its stage, ``global_step`` from 1 in the run.

    ``loss`` (nats per supervised token) and ``grad_norm`` are ``None`` if no row of the step could be used.
    ``learning_rates`` are by glob; ``lr`` is the highest of them. ``tokens`` are true ones, visual ones
    included; ``positions`` is what the decoder ran on, padding too. A model with experts adds ``balance``,
    the part of ``loss`` that balances them, and at times ``experts``: by layer, what ``expert_loads`` says.
    ``reused`` is the folder of the result that took the place of the whole stage, told as its last step.
    ``skipped`` says why the step changed no weight. ``sample_ids`` are told where a stage asks for them: one
    list for each process, of what it read.
    """

    stage: str
    step: int
    steps: int
    global_step: int
    loss: float | None
    grad_norm: float | None
    lr: float
    learning_rates: Mapping[str, float]
    samples: int
    quarantined: int
    tokens: int
    positions: int
    supervised_tokens: int
    seconds: float
    wait_seconds: float
    balance: float | None = None
    experts: Mapping[str, Mapping[str, float]] | None = None
    reused: str | None = None
    skipped: str | None = None
    sample_ids: Sequence[Sequence[str]] | None = None


def reused_stage(stage: str, steps: int, global_step: int, folder: Path) -> StepRecord:
    """A stage of so many steps that was not trained, because its result was there, as its last step."""
    return StepRecord(
        stage=stage,
        step=steps,
        steps=steps,
        global_step=global_step,
        loss=None,
        grad_norm=None,
        lr=0.0,
        learning_rates={},
        samples=0,
        quarantined=0,
        tokens=0,
        positions=0,
        supervised_tokens=0,
        seconds=0.0,
        wait_seconds=0.0,
        reused=str(folder),
    )


class Sink(Protocol):
    """Whoever is told about each step."""

    def step(self, record: StepRecord) -> None:
        """Take note of one step."""
        ...

    def sync(self) -> None:
        """Force to disk what a checkpoint relies on."""
        ...

    def close(self) -> None:
        """Finish writing."""
        ...


class MetricsFile:
    """``metrics.jsonl``: one line per step, each step once even if the run was stopped and resumed."""

    def __init__(self, path: Path, keep_steps: int) -> None:
        """Open the file; lines after global step ``keep_steps`` are dropped, for those steps run again."""
        kept = [row for row in read_metrics(path) if row["global_step"] <= keep_steps]
        write_text(path, "".join(_line(row) for row in kept))
        self._path, self._file = path, path.open("a", encoding="utf-8")

    def step(self, record: StepRecord) -> None:
        """Append one line; a reader sees it at once."""
        with storage_errors(self._path):
            self._file.write(_line(_row(record)))
            self._file.flush()

    def sync(self) -> None:
        """Force what was written to disk, as before a checkpoint."""
        with storage_errors(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        with storage_errors(self._path):  # what a full disk did not take is tried once more
            self._file.close()


class TensorBoard:
    """Events for TensorBoard: loss, gradient norm, learning rates and speed over the run's steps."""

    def __init__(self, folder: Path, keep_steps: int) -> None:
        """Open an event file that takes over after global step ``keep_steps``."""
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        self._writer = SummaryWriter(str(folder), purge_step=keep_steps + 1 if keep_steps else None)

    def step(self, record: StepRecord) -> None:
        """Add one point to each curve."""
        values: dict[str, float | None] = {
            "train/loss": record.loss,
            "train/grad_norm": record.grad_norm,
            "speed/tokens_per_second": record.tokens / record.seconds,
            "speed/padding": 1 - record.tokens / max(record.positions, 1),
            "speed/samples_per_second": record.samples / record.seconds,
            **{f"rate/{pattern}": rate for pattern, rate in record.learning_rates.items()},
            "experts/balance": record.balance,
        }
        for layer, figures in (record.experts or {}).items():
            values |= {f"experts/{name}/{layer}": figure for name, figure in figures.items()}
        with storage_errors(self._folder):
            for tag, value in values.items():
                if value is not None:
                    self._writer.add_scalar(tag, value, record.global_step)

    def sync(self) -> None:
        """Nothing: events may be lost."""

    def close(self) -> None:
        """Write out what is pending, if there still is a folder to write to."""
        if self._folder.is_dir():
            with storage_errors(self._folder):
                self._writer.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; one cut short by a crash is left out."""
    if not path.is_file():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def draw_curves(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw loss and learning rates over the run's steps, stage by stage, as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6))
    # Margins that are given: finding them takes half as long again as everything else.
    figure.subplots_adjust(left=0.1, right=0.98, bottom=0.09, top=0.97, hspace=0.14)
    FigureCanvasAgg(figure)
    loss_axes, rate_axes = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for stage in dict.fromkeys(row["stage"] for row in metrics):
        rows = [row for row in metrics if row["stage"] == stage]
        with_loss = [row for row in rows if row["loss"] is not None]
        steps, losses = [row["global_step"] for row in with_loss], [row["loss"] for row in with_loss]
        (line,) = loss_axes.plot(steps, losses, alpha=0.3)
        loss_axes.plot(steps, smoothed(losses), color=line.get_color(), label=stage)
        for pattern in rows[0]["learning_rates"]:
            x = [row["global_step"] for row in rows]
            rate_axes.plot(x, [row["learning_rates"][pattern] for row in rows], label=f"{stage}: {pattern}")
    loss_axes.set_ylabel("loss, nats per token")
    rate_axes.set_ylabel("learning rate")
    rate_axes.set_xlabel("optimizer step")
    rate_axes.ticklabel_format(axis="y", scilimits=(0, 0))
    for axes in (loss_axes, rate_axes):
        axes.yaxis.set_label_coords(-0.07, 0.5)
        axes.grid(alpha=0.3)
        if metrics:
            axes.legend(fontsize="small")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    write_bytes(path, picture.getvalue())


def smoothed(values: Sequence[float], memory: float = 0.9) -> list[float]:
    """Running averages in which each value weighs ``memory`` times the one after it."""
    result: list[float] = []
    total = weight = 0.0
    for value in values:
        total, weight = total * memory + value, weight * memory + 1.0
        result.append(total / weight)
    return result


def _row(record: StepRecord) -> dict[str, Any]:
    """All figures; those that few steps have only where there are some."""
    row = asdict(record)
    return {key: value for key, value in row.items() if key not in _SOMETIMES or value is not None}


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
