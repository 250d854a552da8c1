"""What goes with each update of a stage: whether it is made, the average that follows, what to keep."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor
from torch.optim import Optimizer

from vlmix.core.errors import NonFiniteError, SpikeError
from vlmix.core.files import storage_errors, write_text
from vlmix.train import checkpoint
from vlmix.train.averaging import Averages
from vlmix.train.checkpoint import Found
from vlmix.train.optim import hand_on
from vlmix.train.recipe import Stage
from vlmix.train.records import read_metrics
from vlmix.train.spikes import SpikePolicy
from vlmix.train.trainable import Selection

FILE_NAME = "spikes.jsonl"
_AVERAGES, _SPIKES = "ema", "spikes"  # the stems of a checkpoint's files


class Upkeep:
    """The spike policy and the averages of one stage, whose steps follow ``steps_before`` others.

    Updates that are not made go to ``spikes.jsonl`` in ``folder``, one line each.
    """

    def __init__(
        self, stage: Stage, selection: Selection, folder: Path, steps_before: int, *, writes: bool = True
    ) -> None:
        self._stage, self._path, self._before = stage, folder / FILE_NAME, steps_before
        self._writes = writes
        self._policy = SpikePolicy(stage.spikes)
        self._averages = Averages(stage.ema, selection.parameters) if stage.ema is not None else None

    def begin(self, found: Found | None) -> None:
        """Go on from a checkpoint of the stage, or from its beginning; drop lines of steps that run again.

        Raises:
            CheckpointError: if the checkpoint holds the averages of other weights.

        """
        done = self._before if found is None else found.state.global_step
        if self._writes and self._path.is_file():
            kept = [row for row in read_metrics(self._path) if row["global_step"] <= done]
            write_text(self._path, "".join(map(_line, kept)))
        if found is not None:
            self._policy.load(checkpoint.load_more(found.folder, _SPIKES))
            if self._averages is not None:
                checkpoint.fill_more(found.folder, _AVERAGES, self._averages.state())

    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        """What a checkpoint has to keep, by file."""
        averages = {} if self._averages is None else self._averages.state()
        return {_SPIKES: self._policy.state(), _AVERAGES: averages}

    def reason_to_skip(
        self, step: int, loss: float, grad_norm: float, samples: Sequence[str], explain: Callable[[], str]
    ) -> str:
        """Why the update of ``step`` (from 0) must not be made; empty if it may.

        ``explain`` tells what is not finite.

        Raises:
            NonFiniteError: if loss or gradients are not finite, and that ends the run.
            SpikeError: if they stand out, and that ends the run.

        """
        verdict = self._policy.judge(loss, grad_norm)
        if verdict.action == "update":
            return ""
        figures = {"loss": finite(loss), "grad_norm": finite(grad_norm)}
        if self._stage.spikes is not None and self._writes:
            self._note(step, {"action": verdict.action, "reason": verdict.reason, **figures}, samples)
        if verdict.action == "skip":
            return verdict.reason
        if None in figures.values():
            raise NonFiniteError(explain())
        raise SpikeError(
            f"stage {self._stage.name}, step {step + 1}: {verdict.reason}. The weights were not "
            f"changed, and the last checkpoint is intact. Samples of the step: {', '.join(samples)}"
        )

    def updated(self) -> None:
        """The weights were changed."""
        if self._averages is not None:
            self._averages.update()

    def hand_on(self, optimizer: Optimizer) -> None:
        """The stage ends: set the weights to what the next stage and the published model get."""
        if self._averages is not None:
            self._averages.hand_on()
            self._averages = None
        hand_on(optimizer)

    def _note(self, step: int, what: Mapping[str, object], samples: Sequence[str]) -> None:
        place = {"stage": self._stage.name, "step": step + 1, "global_step": self._before + step + 1}
        with storage_errors(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(_line({**place, **what, "samples": list(samples)}))


def finite(value: float) -> float | None:
    """The value if it is a number that JSON can say."""
    return value if math.isfinite(value) else None


def _line(row: Mapping[str, object]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
