"""The model as it was before a task, frozen: what distillation learns from."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.models.quantised import Nf4Linear
from vlmix.train.checkpoint import unique_tensors
from vlmix.train.continual._base import Batch, Method, Seen, supervised_logits
from vlmix.train.continual._divided import divided_as, gather_anew, held, piece_of

_NAME = "teacher."


class Teacher:
    """What a task changes of ``model``, as it was; for an answer the model takes it back for a moment.

    So it costs the memory of what trains, on each process of what it holds of that, and every way in which a
    model is divided serves it too. Where ``model`` is in the middle of a task, ``weights`` are what it had
    before.
    """

    def __init__(
        self, model: VlmixForConditionalGeneration, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        self._model, self._now = model, _changing(model)
        self._before = {
            name: held(tensor).clone() if weights is None else piece_of(weights[_NAME + name], tensor)
            for name, tensor in self._now.items()
        }

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """The logits it gives for the supervised tokens of ``batch``: (N, V)."""
        kind = batch["labels"].device.type
        # Autocast would find the casts of what the model has now.
        told = {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}
        with self._taken_back(), torch.autocast(kind, cache_enabled=False, **told):
            output = self._model(**batch, logits_to_keep="supervised", use_cache=False)
        return supervised_logits(output, batch["labels"])

    def state(self) -> dict[str, Tensor]:
        """What the task changes in the model, as it was."""
        return {_NAME + name: divided_as(self._before[name], like) for name, like in self._now.items()}

    @contextmanager
    def _taken_back(self) -> Generator[None]:
        training = [module for module in self._model.modules() if module.training]
        self._exchange()
        self._model.eval()
        try:
            yield
        finally:
            self._exchange()
            for module in training:
                module.training = True

    def _exchange(self) -> None:
        """Swap the two; what autograd keeps for a backward pass is as it was after the second time."""
        gather_anew(self._model)
        for name, tensor in self._now.items():
            now, before = held(tensor), self._before[name]
            kept = now.clone()
            now.copy_(before)
            before.copy_(kept)


class Taught(Method):
    """A method that may have a teacher, from the beginning of a task to its end."""

    reads_logits = True

    def __init__(self, settings: object) -> None:
        super().__init__(settings)
        self.teacher: Teacher | None = None

    def remembered(self, model: nn.Module) -> int:
        """What trains, once more."""
        return sum(tensor.numel() for tensor in _changing(model).values()) if self.asks_teacher else 0

    def taught(self, seen: Seen) -> Tensor | None:
        """The teacher's logits for the supervised tokens (N, V); ``None`` without one."""
        return None if self.teacher is None else self.teacher.logits(seen.batch)

    def begin(self, model: VlmixForConditionalGeneration) -> None:
        """Remember what the task will change."""
        if self.asks_teacher:
            self.teacher = Teacher(model)

    def end(self, model: VlmixForConditionalGeneration, batches: Iterator[Batch]) -> None:
        """Let the teacher go."""
        self.teacher = None

    def state(self) -> dict[str, Tensor]:
        """The teacher's weights inside a task."""
        return {} if self.teacher is None else self.teacher.state()

    def load(self, state: Mapping[str, Tensor], model: VlmixForConditionalGeneration) -> None:
        """The teacher again, where the checkpoint was saved inside a task."""
        self.teacher = Teacher(model, state) if any(name.startswith(_NAME) for name in state) else None


def _changing(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that train, and saved buffers: statistics and biases that steps move."""
    packed = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Nf4Linear))
    return {
        name: tensor
        for name, tensor in unique_tensors(model).items()
        if (tensor.requires_grad if isinstance(tensor, nn.Parameter) else not name.startswith(packed))
    }
