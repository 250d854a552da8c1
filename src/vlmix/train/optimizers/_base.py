"""What an optimizer owes a stage: groups of parameters in, a torch optimizer out.

A checkpoint keeps what the optimizer's ``state`` holds for each parameter, tensors and numbers, and of each
group the entries that its key ``remembers`` names. Nothing else may decide the next update.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Protocol, runtime_checkable

from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import nn
from torch.optim import Optimizer

from vlmix.core.settings import PartSettings

Fraction = Annotated[float, Field(ge=0, lt=1)]
ParameterGroup = dict[str, Any]


class OptimizerSettings(PartSettings):
    """What every optimizer has. Norms, biases and other one-dimensional weights are never decayed."""

    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0


class OptimizerKind(ABC):
    """A kind of optimizer, built from its settings.

    One that ``averages`` wants rates that stay at their peak. ``bytes_per_number`` is what it keeps of
    each number it trains, for plans.
    """

    settings_class: ClassVar[type[OptimizerSettings]]
    averages: ClassVar[bool] = False
    bytes_per_number: ClassVar[int] = 8

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    @abstractmethod
    def build(self, groups: Sequence[ParameterGroup], model: nn.Module) -> Optimizer:
        """The optimizer of ``groups``: each with ``params``, ``lr``, ``weight_decay``, and more to keep.

        ``decays`` is false of groups that are never decayed, whatever the weight decay.

        Raises:
            InputError: if it needs a package that is not installed.

        """


@runtime_checkable
class AveragingOptimizer(Protocol):
    """An optimizer whose weights in training are not those to be used: ``eval`` puts these in place."""

    def train(self) -> None:
        """Put the weights that train in place."""
        ...

    def eval(self) -> None:
        """Put the averaged weights in place."""
        ...
