"""Elastic weight consolidation: weights that earlier tasks rest on are held near where they were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vlmix.core.settings import PartSettings, Settings
from vlmix.models.losses import supervised_share
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.train.continual import CONTINUAL
from vlmix.train.continual._base import Batch, Method, Seen, trained
from vlmix.train.continual._divided import copies, divided_as, held, laid_out
from vlmix.train.continual._fisher import fisher_diagonal, own_text
from vlmix.train.parallel.pieces import local


class OwnText(Settings):
    """Texts that the language model writes before the first task, so that its language counts as a task."""

    samples: PositiveInt = 128
    tokens: PositiveInt = 128
    seed: Annotated[int, Field(ge=0)] = 0


class EwcSettings(PartSettings):
    """``weight`` is lambda. Each task's Fisher information is measured on ``samples`` of its conversations.

    ``separate`` keeps one for each task; ``online`` one in all, older parts multiplied by ``decay`` whenever
    a task ends. ``language`` is how task 1 is measured; with ``null`` it is not protected.
    """

    kind: Literal["ewc"] = "ewc"  # pyright: ignore[reportIncompatibleVariableOverride]
    weight: PositiveFloat = 1.0
    mode: Literal["online", "separate"] = "online"
    decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    samples: PositiveInt = 256
    language: OwnText | None = Field(default_factory=OwnText)

    @classmethod
    def tiny(cls) -> Self:
        """Two samples of everything, one penalty a task."""
        return cls(samples=2, mode="separate", language=OwnText(samples=2, tokens=4))


@dataclass(frozen=True, slots=True)
class _Held:
    """What one penalty holds: how strongly, and where, by name of the parameter and divided as it is."""

    fisher: dict[str, Tensor]
    anchor: dict[str, Tensor]


@CONTINUAL.register("ewc")
class Ewc(Method):
    """Adds lambda / 2 sum F (w - w*)^2 to the loss of a step.

    Papers: Kirkpatrick et al., arXiv:1612.00796, equation 3; online: Schwarz et al., arXiv:1805.06370.
    """

    settings_class = EwcSettings
    settings: EwcSettings

    def __init__(self, settings: EwcSettings) -> None:
        super().__init__(settings)
        self._held: list[_Held] = []
        # As they are between passes: during one, a process may have gathered them.
        self._own: dict[str, nn.Parameter] = {}

    def remembered(self, model: nn.Module) -> int:
        """Two numbers for each that trains, in ``separate`` mode for every task so far; counted for one."""
        return 2 * sum(parameter.numel() for parameter in trained(model).values())

    def begin(self, model: VlmixForConditionalGeneration) -> None:
        """Before the first task, measure the language on text that the model writes."""
        self._look_at(model)
        language = self.settings.language
        if self._held or language is None:
            return
        named = {name: p for name, p in self._own.items() if name.startswith("model.language_model.")}
        asked = {"samples": language.samples, "tokens": language.tokens, "seed": language.seed}
        texts = own_text(model, self.processes, **asked)
        self._hold(self._measured(model, named, texts, language.samples), named)

    def penalty(self, seen: Seen) -> Tensor | None:
        """The micro-batch's share of the penalty, in float32.

        A process knows its part of each weight alone, so that part costs by the share that the micro-batches
        of all processes have together; what all hold whole costs by this one's.
        """
        divided, whole = list[Tensor](), list[Tensor]()
        # In the model's order, in which a run that goes on finds them too.
        pairs = [(kept, *each) for kept in self._held for each in self._own.items() if each[0] in kept.fisher]
        for kept, name, parameter in pairs:
            away = local(parameter).float() - local(kept.anchor[name])
            term = (local(kept.fisher[name]) * away.square()).sum()
            if not isinstance(parameter, DTensor):
                whole.append(term)
                continue
            # The step's loss is a sum over processes, and some hold the same part; gradients are each one's.
            divided.append(term - term.detach() * (1 - 1 / copies(parameter)))
        share = torch.as_tensor(supervised_share(seen.batch["labels"], seen.items))
        total = [share * torch.stack(whole).sum()] if whole else []
        if divided:
            everywhere = self.processes.sum(share.float())
            total.append(everywhere * torch.stack(divided).sum())
        return self.settings.weight / 2 * torch.stack(total).sum() if total else None

    def end(self, model: VlmixForConditionalGeneration, batches: Iterator[Batch]) -> None:
        """Measure what the task taught, and remember where its weights are."""
        self._look_at(model)
        self._hold(self._measured(model, self._own, batches, self.settings.samples), self._own)

    def state(self) -> dict[str, Tensor]:
        """Every Fisher information and the weights it holds on to."""
        return {
            f"{kind}.{index}.{name}": tensor
            for index, kept in enumerate(self._held)
            for kind, tensors in (("fisher", kept.fisher), ("anchor", kept.anchor))
            for name, tensor in tensors.items()
        }

    def load(self, state: Mapping[str, Tensor], model: VlmixForConditionalGeneration) -> None:
        """Take them up again."""
        count = len({name.split(".", 2)[1] for name in state})
        self._held = [_Held({}, {}) for _ in range(count)]
        for name in state:
            kind, index, parameter = name.split(".", 2)
            kept = self._held[int(index)]
            # A clone: memory mapped from a file is aligned differently, which can change a sum's last bit.
            whole = state[name].to(model.device).clone()
            (kept.fisher if kind == "fisher" else kept.anchor)[parameter] = whole
        self._look_at(model)

    def _look_at(self, model: VlmixForConditionalGeneration) -> None:
        """Know what trains, and bring what is held of it into the parts that it is now in."""
        self._own = trained(model)
        for tensors in (tensors for kept in self._held for tensors in (kept.fisher, kept.anchor)):
            for name in (name for name in self._own if name in tensors):
                tensors[name] = laid_out(tensors[name], self._own[name])

    def _measured(
        self,
        model: VlmixForConditionalGeneration,
        named: Mapping[str, nn.Parameter],
        batches: Iterator[Batch],
        samples: int,
    ) -> dict[str, Tensor]:
        return fisher_diagonal(model, named, batches, samples, self.processes.world)

    def _hold(self, fisher: dict[str, Tensor], named: Mapping[str, nn.Parameter]) -> None:
        fisher = {name: divided_as(tensor, named[name]) for name, tensor in fisher.items()}
        anchor = {name: divided_as(held(p).clone(), p) for name, p in named.items()}
        if self.settings.mode == "separate" or not self._held:
            self._held.append(_Held(fisher, anchor))
            return
        old = self._held[0]
        faded = {name: tensor * self.settings.decay for name, tensor in old.fisher.items()}
        summed = {name: tensor + faded[name] if name in faded else tensor for name, tensor in fisher.items()}
        self._held = [_Held({**faded, **summed}, {**old.anchor, **anchor})]
