"""lm-evaluation-harness's model ``vlmix``; ``python -m vlmix.evals.harness`` is its command with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.utils import simple_parse_args_string  # pyright: ignore[reportMissingImports]

from vlmix.core.sample import Decoding, Responder
from vlmix.evals.bridges import PlainRequests
from vlmix.evals.opened import opened


@register_model("vlmix")
class HarnessModel(LM):
    """Answers the harness without any chat template; made from ``pretrained``, a model or run folder."""

    def __init__(self, responder: Responder, decoding: Decoding) -> None:
        super().__init__()
        self.asked = PlainRequests(responder, decoding)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> Self:
        """From the harness's ``--model_args``, such as ``pretrained=runs/two_eyes``.

        Raises:
            InputError: if an argument is none that vlmix knows.
            CheckpointError: if there is no such model.

        """
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> Self:
        """The same from arguments by name.

        Raises:
            InputError: if an argument is none that vlmix knows.
            CheckpointError: if there is no such model.

        """
        return cls(*opened({**(additional_config or {}), **arg_dict}))

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """The log of how likely each continuation is, and whether it is the greedy one."""
        return self.asked.loglikelihood(requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """The log of how likely each whole text is."""
        return self.asked.loglikelihood_rolling(requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """How each text goes on, greedily, up to the first of the request's stop words."""
        return self.asked.generate_until(requests)


def adapter(responder: Responder, decoding: Decoding) -> HarnessModel:
    """The responder for ``lm_eval.simple_evaluate``."""
    return HarnessModel(responder, decoding)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    cli_evaluate()
