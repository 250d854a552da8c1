"""Several methods at once: each hook asks every part in turn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.train.continual._base import Batch, Memory, Method, Past, Seen
from vlmix.train.parallel.processes import Processes


class Composed(Method):
    """A method made of others, ``parts``; at most one of them may replace the loss of answers or reshape."""

    reads_logits = True

    def __init__(self, settings: object, parts: Sequence[Method]) -> None:
        super().__init__(settings)
        self.parts = tuple(parts)

    @property
    def asks_teacher(self) -> bool:
        """Whether any part has one."""
        return any(part.asks_teacher for part in self.parts)

    def join(self, processes: Processes) -> None:
        """Told to every part."""
        super().join(processes)
        for part in self.parts:
            part.join(processes)

    def reshape(self, model: VlmixForConditionalGeneration) -> None:
        """Each part's structure."""
        for part in self.parts:
            part.reshape(model)

    def fill(self, model: VlmixForConditionalGeneration) -> None:
        """Each part's values."""
        for part in self.parts:
            part.fill(model)

    def train(
        self, patterns: Mapping[str, float], model: VlmixForConditionalGeneration
    ) -> Mapping[str, float]:
        """What trains after each part had its say."""
        for part in self.parts:
            patterns = part.train(patterns, model)
        return patterns

    def extra(self, past: Sequence[Past], seed: int) -> list[Memory]:
        """Every part's memories."""
        return [memory for part in self.parts for memory in part.extra(past, seed)]

    def begin(self, model: VlmixForConditionalGeneration) -> None:
        """Each part looks."""
        for part in self.parts:
            part.begin(model)

    def remembered(self, model: nn.Module) -> int:
        """What all keep together."""
        return sum(part.remembered(model) for part in self.parts)

    def answers(self, seen: Seen) -> Tensor | None:
        """That of the part which has one."""
        found = [loss for part in self.parts if (loss := part.answers(seen)) is not None]
        return found[0] if found else None

    def penalty(self, seen: Seen) -> Tensor | None:
        """The sum of all."""
        found = [term for part in self.parts if (term := part.penalty(seen)) is not None]
        return sum(found[1:], found[0]) if found else None

    def end(self, model: VlmixForConditionalGeneration, batches: Iterator[Batch]) -> None:
        """Each part looks, in order."""
        for part in self.parts:
            part.end(model, batches)

    def state(self) -> dict[str, Tensor]:
        """Every part's tensors, with the part's number before their names."""
        return {
            f"{index}.{name}": tensor
            for index, part in enumerate(self.parts)
            for name, tensor in part.state().items()
        }

    def load(self, state: Mapping[str, Tensor], model: VlmixForConditionalGeneration) -> None:
        """Give each part its own."""
        for index, part in enumerate(self.parts):
            start = f"{index}."
            own = {name.removeprefix(start): t for name, t in state.items() if name.startswith(start)}
            part.load(own, model)
