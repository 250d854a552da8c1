"""Elastic weight consolidation: weights that earlier tasks rest on are held near where they were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from vlmix.core.settings import PartSettings, Settings
from vlmix.models.losses import supervised_share
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.train.continual import CONTINUAL
from vlmix.train.continual._base import Batch, Method, Seen, trained
from vlmix.train.continual._fisher import fisher_diagonal, own_text


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
    """What one penalty holds: how strongly, and where, by name of the parameter."""

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

    @property
    def needs_whole(self) -> str:
        """Gradients of one conversation."""
        return "measures every weight on single conversations"

    def begin(self, model: VlmixForConditionalGeneration) -> None:
        """Before the first task, measure the language on text that the model writes."""
        language = self.settings.language
        if self._held or language is None:
            return
        named = {name: p for name, p in trained(model).items() if name.startswith("model.language_model.")}
        texts = own_text(model, samples=language.samples, tokens=language.tokens, seed=language.seed)
        self._hold(fisher_diagonal(model, named, texts, language.samples), named)

    def penalty(self, seen: Seen) -> Tensor | None:
        """The micro-batch's share of the penalty, in float32."""
        own = trained(seen.model)
        terms = [
            (held.fisher[name] * (own[name].float() - held.anchor[name]).square()).sum()
            for held in self._held
            for name in held.fisher
            if name in own
        ]
        if not terms:
            return None
        share = supervised_share(seen.batch["labels"], seen.items)
        return self.settings.weight / 2 * torch.stack(terms).sum() * share

    def end(self, model: VlmixForConditionalGeneration, batches: Iterator[Batch]) -> None:
        """Measure what the task taught, and remember where its weights are."""
        named = trained(model)
        self._hold(fisher_diagonal(model, named, batches, self.settings.samples), named)

    def state(self) -> dict[str, Tensor]:
        """Every Fisher information and the weights it holds on to."""
        return {
            f"{kind}.{index}.{name}": tensor
            for index, held in enumerate(self._held)
            for kind, tensors in (("fisher", held.fisher), ("anchor", held.anchor))
            for name, tensor in tensors.items()
        }

    def load(self, state: Mapping[str, Tensor], model: VlmixForConditionalGeneration) -> None:
        """Take them up again."""
        count = len({name.split(".", 2)[1] for name in state})
        self._held = [_Held({}, {}) for _ in range(count)]
        for name, tensor in state.items():
            kind, index, parameter = name.split(".", 2)
            held = self._held[int(index)]
            into = held.fisher if kind == "fisher" else held.anchor
            # A clone: memory mapped from a file is aligned differently, which can change a sum's last bit.
            into[parameter] = tensor.to(model.device).clone()

    def _hold(self, fisher: dict[str, Tensor], named: Mapping[str, nn.Parameter]) -> None:
        anchor = {name: parameter.detach().clone() for name, parameter in named.items()}
        if self.settings.mode == "separate" or not self._held:
            self._held.append(_Held(fisher, anchor))
            return
        old = self._held[0]
        faded = {name: self.settings.decay * tensor for name, tensor in old.fisher.items()}
        summed = {name: tensor + faded[name] if name in faded else tensor for name, tensor in fisher.items()}
        self._held = [_Held({**faded, **summed}, {**old.anchor, **anchor})]
