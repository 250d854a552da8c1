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

    def reshape(self, model: PreTrainedModel) -> None:  # noqa: B027  (most transforms change no structure)
        """Give ``model`` the structure it will have after ``apply``, and no new weights.

        For a run that goes on from a checkpoint made after ``apply``, and for shapes on the meta device.

        Raises:
            PlanError: if the model cannot have that structure.

        """

    @abstractmethod
    def apply(self, model: PreTrainedModel) -> str:
        """Change ``model`` in place and say in one line what was done.

        Raises:
            RecipeError: if the model has nothing the settings name.

        """
