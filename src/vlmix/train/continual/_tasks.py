"""The tasks of a run, in order, and the method that learns them: what the stages ask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from vlmix.core.batching import BatchingSettings
from vlmix.core.errors import PlanError
from vlmix.core.interfaces import Source
from vlmix.core.parts import read_part
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.train.continual import CONTINUAL
from vlmix.train.continual._base import Batch, Memory, Method, Past
from vlmix.train.order import DataOrder, RowId
from vlmix.train.reading import SampleEncoder, StepReader
from vlmix.train.recipe import Recipe, Stage


@dataclass(frozen=True, slots=True)
class Tasks:
    """The method of a recipe, and the tasks that were planned so far."""

    method: Method
    seed: int
    _past: list[Past] = field(default_factory=list[Past])

    @staticmethod
    def of(recipe: Recipe) -> Tasks:
        """The recipe's tasks; without a method they are learnt plainly.

        Raises:
            UnknownNameError: if there is no such method.
            RecipeError: if a setting does not fit.

        """
        raw = recipe.continual or {"kind": "naive"}
        return Tasks(CONTINUAL.get(raw["kind"])(read_part(CONTINUAL, raw, "continual")), recipe.seed)

    def check(self, world: int) -> None:
        """Look whether the method works with so many processes.

        Raises:
            PlanError: if it does not.

        """
        needed = self.method.needs_whole
        if world > 1 and needed:
            raise PlanError(
                f"continual: this method {needed}, which a model divided among {world} processes does not "
                "allow; use one process, or naive, rehearsal, replay_buffer or even soft_targets"
            )

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


def conversations(reader: StepReader, model: VlmixForConditionalGeneration) -> Iterator[Batch]:
    """The conversations of a stage in the order of training, each a batch of its own."""
    encoder = SampleEncoder(reader.encoder.processor)
    alone = replace(reader, encoder=encoder, batching=BatchingSettings(), micro_batch_size=1, rank=0, world=1)
    for step in range(len(alone)):
        for batch in alone[step].micro_batches:
            if batch is not None:
                yield {name: tensor.to(model.device) for name, tensor in batch.items()}
