"""What other harnesses ask, put to a responder: lm-evaluation-harness plain text, lmms-eval conversations.

Neither is imported here. A request is any object whose ``args`` are those that the harness documents
(EleutherAI/lm-evaluation-harness 0.4.13, ``lm_eval/api/model.py``; EvolvingLMMs-Lab/lmms-eval@059d63b,
``lmms_eval/models/chat``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from PIL import Image

from vlmix.core.errors import InputError
from vlmix.core.sample import Decoding, ImageRef, Responder, Role, Sample, Turn
from vlmix.evals.plain_text import telling

_ROLES: Mapping[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}


class Request(Protocol):
    """One request of a harness."""

    @property
    def args(self) -> tuple[Any, ...]:
        """What is asked."""
        ...


class PlainRequests:
    """Answers plain text without any chat template.

    Documents longer than the context are read in windows that overlap by half, where the harness's own
    models start each window afresh: the figures of such documents are a little better here.
    """

    def __init__(self, responder: Responder, decoding: Decoding) -> None:
        self.responder, self.decoding = responder, decoding

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """For (context, continuation): the log of how likely it is, and whether it is the greedy one.

        Raises:
            InputError: if the responder cannot tell.

        """
        pairs = [(str(request.args[0]), str(request.args[1])) for request in requests]
        return [(-found.nats, found.greedy) for found in telling(self.responder).likelihoods(pairs)]

    def loglikelihood_rolling(self, requests: Sequence[Request]) -> list[float]:
        """For (text,): the log of how likely the whole text is.

        Raises:
            InputError: if the responder cannot tell.

        """
        pairs = [("", str(request.args[0])) for request in requests]
        return [-found.nats for found in telling(self.responder).likelihoods(pairs)]

    def generate_until(self, requests: Sequence[Request]) -> list[str]:
        """For (context, options): how the text goes on, up to the first of the options' stop words."""
        asked = [(str(request.args[0]), dict(request.args[1])) for request in requests]
        samples = [
            Sample(f"harness-{number}", (Turn("user", (text,)),)) for number, (text, _) in enumerate(asked)
        ]
        hows = [
            replace(_decoding(self.decoding, options, "max_gen_toks", 256), plain=True)
            for _, options in asked
        ]
        return _said(self.responder, samples, hows, [options for _, options in asked])


class ConversationRequests:
    """Answers conversations with pictures, as lmms-eval's chat models are asked.

    A request's ``args`` are (context, messages of a document, options, its number, task, split). The
    ``documents`` are the harness's, by task and split.
    """

    def __init__(self, responder: Responder, decoding: Decoding) -> None:
        self.responder, self.decoding = responder, decoding

    def generate_until(
        self, requests: Sequence[Request], documents: Mapping[str, Mapping[str, Any]]
    ) -> list[str]:
        """The answers, in order, each up to the first of its stop words.

        Raises:
            InputError: if a document shows what is neither text nor a picture.

        """
        samples: list[Sample] = []
        every: list[dict[str, Any]] = []
        for place, request in enumerate(requests):
            _, messages_of, options, number, task, split = request.args
            turns = tuple(map(_turn, messages_of(documents[task][split][number])))
            samples.append(Sample(f"{task}/{split}/{number}/{place}", turns))
            every.append(dict(options))
        hows = [_decoding(self.decoding, options, "max_new_tokens", 128) for options in every]
        return _said(self.responder, samples, hows, every)


def _turn(message: Mapping[str, Any]) -> Turn:
    role, content = _ROLES.get(message["role"]), message["content"]
    if role is None:
        raise InputError(f"a message is said by {message['role']!r}, neither system, user nor assistant")
    return Turn(role, (content,) if isinstance(content, str) else tuple(map(_part, content)))


def _part(part: Mapping[str, Any]) -> str | ImageRef:
    if part["type"] == "text":
        return str(part["text"])
    if part["type"] == "image" and isinstance(part["url"], Image.Image):
        return ImageRef(part["url"])
    raise InputError(f"a message shows {part['type']!r}; this model sees pictures and reads text")


def _decoding(decoding: Decoding, options: Mapping[str, Any], length: str, default: int) -> Decoding:
    """How one request is to be answered; greedily unless it asks for samples and a temperature."""
    drawn = (options.get("do_sample", True) and options.get("temperature")) or 0.0
    return replace(
        decoding,
        max_new_tokens=int(options.get(length, default)),
        temperature=float(drawn),
        beams=int(options.get("num_beams") or 1),
    )


def _said(
    responder: Responder,
    samples: Sequence[Sample],
    hows: Sequence[Decoding],
    options: Sequence[Mapping[str, Any]],
) -> list[str]:
    """The answers in order; those that are to be given in one way are asked for together."""
    alike = defaultdict[Decoding, list[int]](list)
    for place, how in enumerate(hows):
        alike[how].append(place)
    found = [""] * len(samples)
    for how, places in alike.items():
        answers = responder.respond([samples[place] for place in places], how)
        for place, answer in zip(places, answers, strict=True):
            found[place] = _until(answer.text, options[place].get("until") or [])
    return found


def _until(text: str, stops: str | Iterable[str]) -> str:
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.partition(stop)[0] if stop else text
    return text
