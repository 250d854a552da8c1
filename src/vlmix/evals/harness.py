"""A responder in the shape that lm-evaluation-harness asks for: three questions about plain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]

from vlmix.core.sample import Decoding, Responder, Sample, Turn
from vlmix.evals.plain_text import telling


class HarnessModel(LM):
    """Answers the harness without any chat template.

    Documents longer than the context are read in windows that overlap by half, where the harness's own
    models start each window afresh: the figures of such documents are a little better here.
    """

    def __init__(self, responder: Responder, decoding: Decoding) -> None:
        super().__init__()
        self.responder, self.decoding = responder, decoding

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """The log of how likely each continuation is, and whether it is the greedy one.

        Raises:
            InputError: if the responder cannot tell.

        """
        pairs = [(str(request.args[0]), str(request.args[1])) for request in requests]
        told = telling(self.responder).likelihoods(pairs, self.decoding.batch_size)
        return [(-found.nats, found.greedy) for found in told]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """The log of how likely each whole text is.

        Raises:
            InputError: if the responder cannot tell.

        """
        pairs = [("", str(request.args[0])) for request in requests]
        told = telling(self.responder).likelihoods(pairs, self.decoding.batch_size)
        return [-found.nats for found in told]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """How each text goes on, greedily, up to the first of the request's stop words."""
        found: list[str] = []
        for number, request in enumerate(requests):
            text, options = str(request.args[0]), dict(request.args[1])
            decoding = replace(self.decoding, plain=True, max_new_tokens=_length(options))
            asked = Sample(f"harness-{number}", (Turn("user", (text,)),))
            answer = next(iter(self.responder.respond([asked], decoding)))
            found.append(_until(answer.text, options.get("until") or []))
        return found


def adapter(responder: Responder, decoding: Decoding) -> HarnessModel:
    """The responder for ``lm_eval.simple_evaluate``."""
    return HarnessModel(responder, decoding)


def _length(options: dict[str, Any]) -> int:
    return int(options.get("max_gen_toks", 256))


def _until(text: str, stops: str | Sequence[str]) -> str:
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.partition(stop)[0] if stop else text
    return text
