"""What a method of continual learning owes: hooks around the stages that are tasks, all of which return."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmix.core.interfaces import Source
from vlmix.core.settings import PartSettings
from vlmix.models.losses import IGNORED, supervised_positions
from vlmix.models.modeling import VlmixForConditionalGeneration, VlmixOutput
from vlmix.train.parallel.processes import Processes

Batch = Mapping[str, Tensor]


class NoSettings(PartSettings):
    """A method without settings of its own."""

    @classmethod
    def tiny(cls) -> NoSettings:
        """Nothing to shrink."""
        return cls()  # pyright: ignore[reportCallIssue]  (every subclass says its kind)


class Drawn(Protocol):
    """A row that a stage drew: the number of its source, and its own."""

    @property
    def source(self) -> int:
        """Number of the source in its stage."""
        ...

    @property
    def row(self) -> int:
        """Number of the row in its source."""
        ...


@dataclass(frozen=True, slots=True)
class Past:
    """An earlier task: its own sources, and every row of them that it drew, in order."""

    task: str
    sources: Sequence[Source]
    drawn: Callable[[], Iterator[Drawn]]


@dataclass(frozen=True, slots=True)
class Memory:
    """Rows of earlier tasks to mix into a stage.

    They have ``share`` of all draws; where that is ``None`` each has as many as one of the stage's own rows.
    """

    name: str
    source: Source
    share: float | None = None


@dataclass(frozen=True)
class Seen:
    """One micro-batch after its forward pass; ``items`` are the supervised tokens of the whole step.

    ``output`` has the logits of the positions that ``logits_to_keep="supervised"`` keeps.
    """

    model: PreTrainedModel
    batch: Batch
    output: VlmixOutput
    items: int | Tensor

    @cached_property
    def labels(self) -> Tensor:
        """The supervised tokens of all rows: (N,)."""
        after_BK = after_kept(self.batch["labels"])
        return after_BK[after_BK != IGNORED]

    @cached_property
    def logits(self) -> Tensor:
        """The logits that predict them, in float32: (N, V)."""
        return supervised_logits(self.output, self.batch["labels"])


def after_kept(labels_BT: Tensor) -> Tensor:
    """The token after each position that the head sees: (B, K)."""
    return F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)[:, supervised_positions(labels_BT)]


def supervised_logits(output: VlmixOutput, labels_BT: Tensor) -> Tensor:
    """The logits of supervised tokens, in float32: (N, V)."""
    if output.logits is None:
        raise ValueError("a continual method reads logits, and this output has none")
    return output.logits[after_kept(labels_BT) != IGNORED].float()


class Method(ABC):
    """Plain fine-tuning, whatever a subclass leaves out.

    The order of calls in a stage with a ``task``: ``reshape`` gives the model the structure it is trained in,
    ``fill`` gives what is new in it its values, ``train`` says what trains, ``begin`` sees the model before
    the first step (in its place, where a run goes on inside a task, ``load``), ``loss`` is what each
    micro-batch costs, and ``end`` sees the trained model. ``extra`` is asked when the run is planned. Sums
    over micro-batches and processes of ``loss`` are the step's: what is not a sum over tokens is weighed by
    the micro-batch's share of them. From ``fill`` on the model may be divided among ``processes``, all of
    which make the same calls.
    """

    settings_class: ClassVar[type[PartSettings]]
    # A subclass that reads logits in its loss says so: fused losses never make them.
    reads_logits: ClassVar[bool] = False
    # A subclass whose ``reshape`` does something.
    reshapes: ClassVar[bool] = False

    def __init__(self, settings: Any) -> None:
        self.settings = settings
        self.processes = Processes()

    @property
    def asks_teacher(self) -> bool:
        """Whether the model as it was before a task answers every micro-batch too."""
        return False

    def join(self, processes: Processes) -> None:
        """Told once, when the run is planned: the processes that the model is divided among."""
        self.processes = processes

    def reshape(self, model: VlmixForConditionalGeneration) -> None:  # noqa: B027  (most change no structure)
        """Give ``model`` the structure a task is trained in; ``end`` takes it away.

        Raises:
            PlanError: if the model cannot have it.

        """

    def fill(self, model: VlmixForConditionalGeneration) -> None:  # noqa: B027
        """Give what ``reshape`` added its first values, on a model that may be divided."""

    def train(
        self, patterns: Mapping[str, float], model: VlmixForConditionalGeneration
    ) -> Mapping[str, float]:
        """The stage's ``train`` as it is meant in the structure of ``reshape``.

        Raises:
            RecipeError: if nothing would train.

        """
        del model
        return patterns

    def extra(self, past: Sequence[Past], seed: int) -> list[Memory]:
        """What to mix into a task, given those before it; the language that came first is not among them."""
        del past, seed
        return []

    def begin(self, model: VlmixForConditionalGeneration) -> None:  # noqa: B027
        """Look at the model before the first step of a task; what trains is set."""

    def remembered(self, model: nn.Module) -> int:
        """Numbers that are kept while a task is trained, beside ``model`` whose trained parts are marked."""
        del model
        return 0

    def answers(self, seen: Seen) -> Tensor | None:
        """What takes the place of the cross entropy of the answers; ``None`` leaves it."""
        del seen
        return None

    def penalty(self, seen: Seen) -> Tensor | None:
        """What is added."""
        del seen
        return None

    def loss(self, model: PreTrainedModel, batch: Batch, output: VlmixOutput, items: int | Tensor) -> Tensor:
        """The loss of one micro-batch, divided by ``items``, the supervised tokens of the whole step."""
        seen = Seen(model, batch, output, items)
        answers, penalty = self.answers(seen), self.penalty(seen)
        if output.loss is None:
            raise ValueError("the model was given no labels")
        total = output.loss
        if answers is not None:
            total = answers if output.aux_loss is None else answers + output.aux_loss
        return total if penalty is None else total + penalty

    def end(self, model: VlmixForConditionalGeneration, batches: Iterator[Batch]) -> None:  # noqa: B027
        """Look at the model after the last step; ``batches`` are conversations of the task, one by one."""

    def state(self) -> dict[str, Tensor]:
        """What a run must keep to go on: tensors by name."""
        return {}

    def load(self, state: Mapping[str, Tensor], model: VlmixForConditionalGeneration) -> None:  # noqa: B027
        """Take up what ``state`` gave; ``model`` has the structure, weights and trained parts it had."""


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters a stage trains, by name; tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
