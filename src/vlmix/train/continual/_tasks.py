"""The tasks of a run, in order, and the method that learns them: what the stages ask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import repeat

from vlmix.core.batching import BatchingSettings
from vlmix.core.interfaces import Source
from vlmix.core.parts import read_part
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.train.continual import CONTINUAL
from vlmix.train.continual._base import Batch, Memory, Method, Past
from vlmix.train.continual._divided import input_device
from vlmix.train.continual._memory import Counted
from vlmix.train.order import DataOrder, RowId
from vlmix.train.parallel.processes import Processes
from vlmix.train.reading import SampleEncoder, StepReader
from vlmix.train.recipe import Recipe, Stage


@dataclass(frozen=True, slots=True)
class Tasks:
    """The method of a recipe, and the tasks that were planned so far."""

    method: Method
    seed: int
    _past: list[Past] = field(default_factory=list[Past])

    @staticmethod
    def of(recipe: Recipe, processes: Processes | None = None) -> Tasks:
        """The recipe's tasks, learnt by so many processes; without a method they are learnt plainly.

        Raises:
            UnknownNameError: if there is no such method.
            RecipeError: if a setting does not fit.

        """
        raw = recipe.continual or {"kind": "naive"}
        method = CONTINUAL.get(raw["kind"])(read_part(CONTINUAL, raw, "continual"))
        method.join(processes or Processes())
        return Tasks(method, recipe.seed)

    def reshapes(self, stage: Stage) -> bool:
        """Whether ``stage`` is trained in another structure."""
        return bool(stage.task) and self.method.reshapes

    def reshape(self, stage: Stage, model: VlmixForConditionalGeneration) -> None:
        """Give ``model`` the structure that ``stage`` trains.

        Raises:
            PlanError: if it cannot have that.

        """
        if stage.task:
            self.method.reshape(model)

    def fill(self, stage: Stage, model: VlmixForConditionalGeneration) -> None:
        """Give what that structure added to ``model``, which may be divided, its first values."""
        if stage.task:
            self.method.fill(model)

    def meant(self, stage: Stage, model: VlmixForConditionalGeneration) -> Stage:
        """``stage`` with the ``train`` it has in that structure.

        Raises:
            RecipeError: if nothing would train.

        """
        if not stage.task:
            return stage
        return stage.model_copy(update={"train": dict(self.method.train(stage.train, model))})

    def memories(self, stage: Stage) -> list[Memory]:
        """What is mixed into ``stage`` from the tasks planned before it."""
        return self.method.extra(self._past, self.seed) if stage.task else []

    def planned(self, stage: Stage, sources: Sequence[Source], order: DataOrder) -> None:
        """Note what ``stage`` will draw from its own sources."""
        if not stage.task:
            return

        def drawn() -> Iterator[RowId]:
            rows = (row for step in range(order.steps) for row in order.rows_for_step(step))
            return (row for row in rows if row.source < len(sources))

        self._past.append(Past(stage.task, tuple(sources), drawn))

    def counted(self, stage: Stage, sizes: Sequence[int], order: DataOrder) -> None:
        """Note of ``stage`` what a plan knows: how many rows its sources have, and how many are drawn."""
        if stage.task:
            # Which rows they are changes no number; draws from memories are taken for the stage's own.
            drawn = partial(repeat, RowId(0, 0), order.draws)
            self._past.append(Past(stage.task, tuple(map(Counted, sizes)), drawn))


def mixed_weights(
    weights: Sequence[float | None], sizes: Sequence[int], memories: Sequence[Memory]
) -> list[float | None]:
    """The weights of a stage's sources, of these sizes, and of what is mixed in.

    A memory without a share has as many draws for each of its rows as the stage's own have on average.
    """
    parts = [size if weight is None else weight for weight, size in zip(weights, sizes, strict=True)]
    own, shares = sum(parts), sum(memory.share or 0 for memory in memories)
    rest = own / (1 - shares)
    return [*weights, *(_weight(memory, own / max(sum(sizes), 1), rest) for memory in memories)]


def _weight(memory: Memory, per_row: float, whole: float) -> float | None:
    if memory.share is not None:
        return memory.share * whole
    return None if per_row == 1 else per_row * len(memory.source)


def conversations(
    reader: StepReader, model: VlmixForConditionalGeneration, processes: Processes
) -> Iterator[Batch]:
    """The conversations of a stage in the order of training, each a batch of its own, the same on all."""
    encoder, device = SampleEncoder(reader.encoder.processor), input_device(model, processes)
    alone = replace(reader, encoder=encoder, batching=BatchingSettings(), micro_batch_size=1, rank=0, world=1)
    for step in range(len(alone)):
        for batch in alone[step].micro_batches:
            if batch is not None:
                yield {name: tensor.to(device) for name, tensor in batch.items()}
