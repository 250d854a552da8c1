"""What a family of published checkpoints owes: recognise a folder, say what it means, and write it back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from vlmix.convert._names import Names
from vlmix.convert._source import PublishedFolder
from vlmix.models.configuration import VlmixConfig
from vlmix.models.image_processing import Fit


@dataclass(frozen=True)
class Reading:
    """What a folder means: keyword arguments of ``VlmixConfig``, and where every tensor goes.

    ``towers`` are further folders with weights that the checkpoint only names, and their own rules.
    ``chat_template`` is the template its authors trained with; ``fit`` how pictures were made square.
    """

    config: Mapping[str, Any]
    names: Names
    towers: Sequence[tuple[PublishedFolder, Names]] = field(default=())
    chat_template: str = "vicuna"
    fit: Fit = "pad"


@dataclass(frozen=True)
class Writing:
    """The published ``config.json`` of a model, and where every tensor goes."""

    config: Mapping[str, Any]
    names: Names


class Family(ABC):
    """One file in ``vlmix.convert.families``, found by its name.

    ``indexed`` says that the authors' code needs an index even where there is only one file of weights.
    """

    indexed: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def recognises(cls, folder: PublishedFolder) -> bool:
        """Whether architecture, tensor names and shapes are this family's; folder names do not count."""

    @classmethod
    @abstractmethod
    def read(cls, folder: PublishedFolder) -> Reading:
        """Everything but the tensors themselves.

        Raises:
            CheckpointError: if something in the folder has no counterpart here.

        """

    @classmethod
    @abstractmethod
    def write(cls, config: VlmixConfig) -> Writing:
        """How a model made here is stored so that the authors' code can read it.

        Raises:
            CheckpointError: if the model has a part that this family does not.

        """
