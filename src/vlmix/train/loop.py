"""The training loop of one stage: accumulate, check, clip, update; told to stop, it stops between steps.

The loss of an optimizer step is the sum over its supervised tokens divided by their number, whatever the
micro-batches: a long answer counts as much as in one large batch. Device and precision come from outside.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from vlmix.core.errors import VlmixError
from vlmix.core.files import write_json
from vlmix.data.ledger import Ledger
from vlmix.models.mixtures import rebalance
from vlmix.moe.balance import RoutingCounts
from vlmix.moe.install import expert_layers
from vlmix.train.continual._base import Method
from vlmix.train.expert_loads import expert_loads, is_told
from vlmix.train.feature_cache import FeatureCache
from vlmix.train.loader import Loader, StepData
from vlmix.train.optim import rate_factor, set_rates
from vlmix.train.parallel.counting import StepCounts
from vlmix.train.parallel.idle import Idle
from vlmix.train.parallel.pieces import local
from vlmix.train.parallel.processes import Processes
from vlmix.train.parallel.sharding import divided_alike, total_norm
from vlmix.train.recipe import Stage
from vlmix.train.records import Sink, StepRecord
from vlmix.train.trainable import Selection, set_modes
from vlmix.train.upkeep import Upkeep, finite

_SUM = "the norm of all gradients together"


@dataclass(frozen=True, slots=True)
class Outcome:
    """Loss and gradient norm of one optimizer step; ``None`` if none of its rows could be used.

    ``balance`` is the experts' part of the loss, and ``counts`` what they were chosen for. ``skipped`` says
    why the weights were not changed.
    """

    loss: float | None
    grad_norm: float | None
    balance: float | None = None
    counts: RoutingCounts | None = None
    skipped: str | None = None


@dataclass(frozen=True, slots=True)
class StageLoop:
    """Everything one stage trains with.

    ``steps_before`` are the run's optimizer steps in earlier stages; ``folder`` is the run's. ``method`` says
    what a micro-batch costs, where the stage is a task; ``features`` what frozen encoders saw before. Several
    ``processes`` run as many micro-batches each; ``idle`` are those of one that has no samples left.
    """

    stage: Stage
    model: PreTrainedModel
    selection: Selection
    optimizer: Optimizer
    upkeep: Upkeep
    loader: Loader
    ledger: Ledger
    sinks: Sequence[Sink]
    steps_before: int
    folder: Path
    method: Method | None = None
    features: FeatureCache | None = None
    processes: Processes = field(default_factory=Processes)
    idle: Idle | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole stage."""
        return self.loader.steps

    def run(self, first_step: int, after_step: Callable[[int], bool]) -> int:
        """Train from step ``first_step`` (from 0) to the end, and return the number of steps done.

        ``after_step`` is called with that number after each step, and ends the loop by returning True.

        Raises:
            NonFiniteError: if a loss or gradient is not finite; the weights are those before the step.
            SpikeError: if they stand out from those before and the stage says to stop.
            DataError: if too many rows are bad.
            VlmixError: if the device has too little memory.

        """
        self._prepare()
        for step in range(first_step, self.steps):
            start = time.perf_counter()
            data = self.loader.step(step, self.ledger)
            outcome, rates = self._train(step, data)
            record = self._record(step, data, outcome, rates, time.perf_counter() - start)
            self._check_folder()
            for sink in self.sinks:
                sink.step(record)
            try:
                stop = after_step(step + 1)
            except Exception:
                self._check_folder()
                raise
            if stop:
                return step + 1
        return self.steps

    def _check_folder(self) -> None:
        if not self.folder.is_dir():
            raise VlmixError(
                f"the folder {self.folder} is gone, and all that was saved with it. Restore it from a copy "
                "and continue with --resume, or start again"
            )

    def _prepare(self) -> None:
        set_modes(self.model)
        # The public switch was renamed within transformers 5; this is what both names call.
        self.model._set_gradient_checkpointing(
            self.stage.gradient_checkpointing, partial(checkpoint, use_reentrant=False)
        )

    def _train(self, step: int, data: StepData) -> tuple[Outcome, Mapping[str, float]]:
        rates = set_rates(self.optimizer, rate_factor(self.stage.schedule, step, self.steps))
        try:
            return self._update(step, data), rates
        except (MemoryError, RuntimeError) as error:
            if not _lacks_memory(error):
                raise
            raise VlmixError(
                f"stage {self.stage.name}, step {step + 1}: no memory left for {len(data.sample_ids)} "
                f"samples ({', '.join(data.sample_ids[:8])}). What was saved is intact: set "
                "gradient_checkpointing and continue with --resume; or lower micro_batch_size or "
                "batching.tokens and start again"
            ) from error

    def _update(self, step: int, data: StepData) -> Outcome:
        """Gradients of all micro-batches, checks, and only then the change of the weights."""
        self.optimizer.zero_grad(set_to_none=True)
        if data.supervised_tokens == 0:
            return Outcome(None, None)
        counts = StepCounts(processes=self.processes) if expert_layers(self.model) else None
        steps: list[tuple[Tensor, Tensor | None]] = []
        batches = self._rounds(data)
        for number, batch in enumerate(batches):
            self.processes.last_backward(self.model, number == len(batches) - 1)
            if counts is not None and self.idle is not None:
                counts.idle = data.micro_batches[number] is None
            steps.append(self._backward(batch, data.supervised_tokens, counts))
        losses, parts = [loss for loss, _ in steps], [part for _, part in steps if part is not None]
        loss = self.processes.sum(torch.stack(losses).sum())
        parameters = [p for p in self.selection.parameters.values() if p.grad is not None]
        self.processes.sum_undivided(parameters)
        norm = total_norm([p.grad for p in parameters if p.grad is not None])
        balance = None if counts is None else self._balance(parts, loss)
        skipped = self.upkeep.reason_to_skip(
            step, loss.item(), norm.item(), data.sample_ids, lambda: self._explain(step, data, losses)
        )
        if skipped:
            return Outcome(finite(loss.item()), finite(norm.item()), balance, counts, skipped)
        if self.stage.clip is not None:
            for alike in divided_alike(parameters):
                clip_grads_with_norm_(alike, self.stage.clip, norm)
        self.optimizer.step()
        self.upkeep.updated()
        if counts is not None:
            rebalance(self.model, counts)
        return Outcome(loss.item(), norm.item(), balance, counts)

    def _balance(self, parts: Sequence[Tensor], like: Tensor) -> float | None:
        """The sum over all processes, of which some may have no part; ``None`` where none has."""
        mine = torch.stack([like.new_zeros(()), *parts]).sum()
        found = self.processes.sum(torch.stack([mine, mine.new_tensor(float(len(parts)))]))
        return found[0].item() if found[1] else None

    def _rounds(self, data: StepData) -> list[Mapping[str, Any]]:
        """As many micro-batches as every process has."""
        if self.idle is None:
            return [batch for batch in data.micro_batches if batch is not None]
        return list(self.idle.filled(data.micro_batches, data.pictured))

    def _backward(
        self, batch: Mapping[str, Any], supervised_tokens: int, counts: RoutingCounts | None
    ) -> tuple[Tensor, Tensor | None]:
        """The loss of one micro-batch, and the part of it that balances experts."""
        device = self.processes.device if self.processes.world > 1 else self.model.device
        inputs = {
            name: given.to(device, non_blocking=True) if isinstance(given, Tensor) else given
            for name, given in batch.items()
        }
        bf16 = self.stage.precision == "bf16"
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            if self.features is not None:
                inputs = self.features.shown(inputs)
            output = self.model(
                **inputs,
                logits_to_keep="supervised",
                fused_loss=self.stage.fused_loss and not (self.method and self.method.reads_logits),
                num_items_in_batch=supervised_tokens,
                use_cache=False,
                **({} if counts is None else {"routing_counts": counts}),
            )
            loss = output.loss
            if self.method is not None:
                loss = self.method.loss(self.model, inputs, output, supervised_tokens)
        if loss.requires_grad:  # not so where a text-only batch meets a stage that trains the eyes
            loss.backward()
        part = None if counts is None or output.aux_loss is None else output.aux_loss.detach().float()
        return loss.detach().float(), part

    def _explain(self, step: int, data: StepData, losses: Sequence[Tensor]) -> str:
        # Each process looks at what it has.
        found = self.processes.gather(first_non_finite(self.model, data.micro_batches, losses))
        culprit = next((name for name in found if name != _SUM), _SUM)
        told = {"stage": self.stage.name, "step": step + 1, "tensor": culprit, "samples": data.sample_ids}
        if self.processes.is_main:
            write_json(self.folder / "non_finite.json", told)
        return (
            f"stage {self.stage.name}, step {step + 1}: {culprit} is not finite. The weights were not "
            f"changed. Samples of the step: {', '.join(data.sample_ids)}"
        )

    def _record(
        self, step: int, data: StepData, outcome: Outcome, rates: Mapping[str, float], seconds: float
    ) -> StepRecord:
        return StepRecord(
            stage=self.stage.name,
            step=step + 1,
            steps=self.steps,
            global_step=self.steps_before + step + 1,
            loss=outcome.loss,
            grad_norm=outcome.grad_norm,
            lr=max(rates.values()),
            learning_rates=rates,
            samples=len(data.sample_ids),
            quarantined=data.quarantined,
            tokens=data.tokens,
            positions=data.positions,
            supervised_tokens=data.supervised_tokens,
            seconds=seconds,
            wait_seconds=data.wait_seconds,
            balance=outcome.balance,
            skipped=outcome.skipped,
            experts=expert_loads(outcome.counts) if is_told(step + 1, self.steps) else None,
            sample_ids=data.samples if self.stage.tell_samples else None,
        )


def _lacks_memory(error: Exception) -> bool:
    """Whether it says so: kernels, libraries and the CPU's allocator report it in words of their own."""
    words = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or any(word in str(error) for word in words)


def first_non_finite(
    model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor] | None], losses: Sequence[Tensor]
) -> str:
    """The first tensor that is not finite, causes before effects: inputs, weights, loss, gradients."""
    for number, batch in enumerate(batches):
        for name, tensor in (batch or {}).items():
            if not bool(tensor.isfinite().all()):
                return f"{name} of micro-batch {number}"
    for name, parameter in model.named_parameters():
        if not bool(local(parameter).isfinite().all()):
            return f"the weight {name}"
    for number, loss in enumerate(losses):
        if not bool(loss.isfinite()):
            return f"the loss of micro-batch {number} ({loss.item()})"
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not bool(local(parameter.grad).isfinite().all()):
            return f"the gradient of {name}"
    return _SUM
