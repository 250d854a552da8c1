"""Answers in the order they are ready, and back in the order of the questions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

from vlmix.core.sample import Answer, Decoding, Responder, Sample


@runtime_checkable
class AnswersInBatches(Protocol):
    """A responder that also gives answers as they are ready, so that they can be kept at once."""

    def batches(self, samples: Sequence[Sample], decoding: Decoding) -> Iterator[Mapping[int, Answer]]:
        """Some answers at a time, by the place of their question; every place comes once."""
        ...


def in_order(batches: Iterable[Mapping[int, Answer]]) -> Iterator[Answer]:
    """The answers of places 0, 1, 2 and so on, each as soon as it and all before it are there."""
    waiting: dict[int, Answer] = {}
    place = 0
    for batch in batches:
        waiting.update(batch)
        while place in waiting:
            yield waiting.pop(place)
            place += 1


def batches_of(
    responder: Responder, samples: Sequence[Sample], decoding: Decoding
) -> Iterator[Mapping[int, Answer]]:
    """The answers as they are ready; one by one from a responder that knows no batches."""
    if isinstance(responder, AnswersInBatches):
        return responder.batches(samples, decoding)
    return ({place: answer} for place, answer in enumerate(responder.respond(samples, decoding)))
