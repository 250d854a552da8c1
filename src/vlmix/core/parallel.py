"""How a run is divided among processes: the settings of a recipe's ``parallel`` block. No torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import PositiveFloat, PositiveInt, model_validator

from vlmix.core.settings import Settings


class ParallelSettings(Settings):
    """What each of several processes keeps of a model, and how long they wait for one another.

    With ``fsdp`` weights, gradients and optimizer states are divided among ``shard`` processes, or all of
    them, and groups of that many hold copies; with ``ddp`` every process holds everything. Gradients are
    summed over processes after the ``last`` micro-batch of a step or, with less memory and more traffic,
    after ``every`` one. ``offload`` keeps what a process holds in main memory between uses.

    A process that gives no sign of life for ``timeout_s`` seconds ends the run everywhere. One that lives
    but never comes to an exchange that others wait at ends it after ``patience_s`` seconds.
    """

    kind: Literal["fsdp", "ddp"] = "fsdp"
    shard: PositiveInt | Literal["all"] = "all"
    reshard_after_forward: bool = True
    reduce: Literal["last", "every"] = "last"
    offload: Literal["cpu"] | None = None
    experts: PositiveInt = 1
    timeout_s: PositiveFloat = 60.0
    patience_s: PositiveFloat = 1800.0

    @model_validator(mode="after")
    def _kinds_differ(self) -> Self:
        if self.kind == "ddp" and (self.shard != "all" or self.offload is not None):
            raise ValueError("`ddp` divides nothing: remove `shard` and `offload`, or say `kind: fsdp`")
        if self.experts > 1 and self.offload is not None:
            raise ValueError("divided `experts` rest where they work: remove `offload`, or `experts`")
        if self.patience_s < self.timeout_s:
            raise ValueError("`patience_s` is less than `timeout_s`; raise it")
        return self
