"""lmms-eval's model ``vlmix``, which it finds by the entry point ``lmms_eval.models`` of this package."""

from __future__ import annotations

from typing import Any

from lmms_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

from vlmix.evals.bridges import ConversationRequests
from vlmix.evals.opened import opened


def manifest() -> ModelManifest:
    """What lmms-eval is told of this model."""
    return ModelManifest(model_id="vlmix", chat_class_path=f"{__name__}.VlmixChat")


class VlmixChat(lmms):
    """Answers lmms-eval's conversations; ``pretrained`` is a model or run folder."""

    is_simple = False

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.asked = ConversationRequests(*opened(arguments))

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answers, in order."""
        return self.asked.generate_until(requests, self.task_dict)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not known to lmms-eval's chat models.

        Raises:
            NotImplementedError: always.

        """
        raise NotImplementedError("conversations are answered in words: take a task with generate_until")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not known to this model.

        Raises:
            NotImplementedError: always.

        """
        raise NotImplementedError("conversations of several rounds are not known: take a task of one round")
