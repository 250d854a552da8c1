"""What a transform owes: one change to a model before a stage starts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from transformers import PreTrainedModel

from vlmix.core.settings import PartSettings


class Transform(ABC):
    """A change to a model, built from its settings; random numbers come from torch's own generator."""

    settings_class: ClassVar[type[PartSettings]]

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    @abstractmethod
    def apply(self, model: PreTrainedModel) -> str:
        """Change ``model`` in place and say in one line what was done.

        Raises:
            RecipeError: if the model has nothing the settings name.

        """
