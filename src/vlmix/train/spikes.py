"""Whether an update is made: losses and gradient norms against those of the steps before."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlmix.core.optimization import SpikeSettings

# The standard deviation of a normal distribution over its median absolute deviation.
_NORMAL = 1.4826


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of an update, and why: ``reason`` is empty where it is made."""

    action: Literal["update", "skip", "stop"]
    reason: str = ""


class SpikePolicy:
    """Judges each update before it is made, and remembers the values of those that were.

    The same values give the same verdicts, in one run as in one that was stopped and went on. Without
    settings only what is not finite stops the run.
    """

    def __init__(self, settings: SpikeSettings | None) -> None:
        self._settings = settings
        self._in_a_row = self.skipped = 0
        window = settings.window if settings is not None else 0
        watched = settings.watch if settings is not None else []
        self._values = {name: deque[float](maxlen=window) for name in watched}

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        """The verdict on an update with this loss and norm of all gradients before clipping."""
        values = {"loss": loss, "grad_norm": grad_norm}
        odd = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if self._settings is None:
            return Verdict("stop", odd[0]) if odd else Verdict("update")
        action = self._settings.non_finite if odd else self._settings.action
        odd = odd or [text for name, seen in self._values.items() if (text := self._odd(name, values, seen))]
        if not odd:
            self._in_a_row = 0
            for name, seen in self._values.items():
                seen.append(values[name])
            return Verdict("update")
        if action == "stop":
            return Verdict("stop", "; ".join(odd))
        self._in_a_row += 1
        self.skipped += 1
        if self._in_a_row > self._settings.in_a_row:
            return Verdict("stop", f"{'; '.join(odd)}, after {self._settings.in_a_row} skipped in a row")
        return Verdict("skip", "; ".join(odd))

    def _odd(self, name: str, values: Mapping[str, float], seen: Sequence[float]) -> str:
        settings = self._settings
        if settings is None or len(seen) < min(settings.least, settings.window):
            return ""
        median = statistics.median(seen)
        spread = _NORMAL * statistics.median([abs(value - median) for value in seen])
        limit = max(median + settings.deviations * spread, settings.factor * median)
        if values[name] <= limit:
            return ""
        return f"{name} {values[name]:.4g} is above {limit:.4g} (median {median:.4g}, spread {spread:.2g})"

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has to keep; nothing where nothing is watched."""
        if self._settings is None:
            return {}
        values = {name: torch.tensor(list(seen), dtype=torch.float64) for name, seen in self._values.items()}
        return {**values, "counts": torch.tensor([self._in_a_row, self.skipped])}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from ``state``."""
        if self._settings is None or not state:
            return
        self._in_a_row, self.skipped = state["counts"].tolist()
        for name, seen in self._values.items():
            seen.clear()
            seen.extend(state[name].tolist())
