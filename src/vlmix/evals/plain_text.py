"""Plain text through a model without any chat template: how likely it is, and how it goes on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmix.core.errors import InputError
from vlmix.core.sample import Responder
from vlmix.models.batching import Encoded
from vlmix.models.encoding import IGNORED, SegmentEncoder
from vlmix.models.rendering import Segment

if TYPE_CHECKING:
    from vlmix.models.modeling import VlmixForConditionalGeneration
    from vlmix.models.processing import VlmixProcessor


_TOKENS: Final = 2048


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely a text is after another: minus the log in ``nats``, over how many ``tokens``.

    ``greedy``: each of its tokens is the likeliest at its place.
    """

    nats: float
    tokens: int
    greedy: bool


@runtime_checkable
class TellsLikelihood(Protocol):
    """A responder that can also say how likely a text is."""

    def likelihoods(
        self, pairs: Sequence[tuple[str, str]], window: int | None = None
    ) -> Iterator[Likelihood]:
        """For each pair, in order, how likely the second text is right after the first."""
        ...


def telling(responder: Responder) -> TellsLikelihood:
    """The responder, if it can say how likely a text is.

    Raises:
        InputError: if it only gives answers.

    """
    if not isinstance(responder, TellsLikelihood):
        raise InputError(
            "this benchmark asks how likely a text is, which answers made elsewhere cannot tell: judge a "
            "model folder"
        )
    return responder


class PlainText:
    """Encodes plain text with a processor's tokenizer; control tokens spelt in it stay text."""

    def __init__(self, processor: VlmixProcessor) -> None:
        self.processor = processor
        self._encoder = SegmentEncoder(processor.tokenizer, "", processor.image_token_id, 0)

    def prompt(self, text: str, room: int, name: str = "") -> Encoded:
        """A text to go on from; of one longer than ``room`` tokens the last ones."""
        ids, labels = self._encoder.encode([Segment("text", text)])
        return self._encoded(ids[-room:], labels[-room:], name)

    def continued(self, before: str, text: str, window: int) -> list[Encoded]:
        """``text`` supervised behind ``before``, in as many windows of ``window`` tokens as it takes.

        Every token of ``text`` is supervised once. A window that is not the first starts with what came
        before, as much as half of it holds. Blanks at the end of ``before`` go with ``text``.
        """
        kept = before.rstrip()
        text, before = before[len(kept) :] + text, kept
        ids, labels = self._encoder.encode([Segment("text", before), Segment("text", text, supervised=True)])
        if not self._starts(ids) and labels and labels[0] != IGNORED:
            ids, labels = [self._start, *ids], [IGNORED, *labels]
        first = next((place for place, label in enumerate(labels) if label != IGNORED), len(ids))
        windows: list[Encoded] = []
        while first < len(ids):
            new = min(len(ids) - first, window - 1 if not windows else window // 2)
            start = max(0, first + new - window)
            shown = labels[start : first + new]
            shown[: first - start] = [IGNORED] * (first - start)
            windows.append(self._encoded(ids[start : first + new], shown, ""))
            first += new
        return windows

    def _encoded(self, ids: list[int], labels: list[int], name: str) -> Encoded:
        told = ids if self.processor.reads_instruction else None
        return Encoded(ids, labels, sample_id=name, instruction_ids=told)

    def _starts(self, ids: Sequence[int]) -> bool:
        return bool(ids) and ids[0] == self.processor.tokenizer.bos_token_id

    @property
    def _start(self) -> int:
        """What stands before a text that nothing precedes: the begin token, else the end token."""
        tokenizer = self.processor.tokenizer
        found = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if found is None:
            raise InputError("the tokenizer has neither a begin nor an end token to put before a text")
        return int(found)


def likelihoods(
    model: VlmixForConditionalGeneration,
    processor: VlmixProcessor,
    pairs: Sequence[tuple[str, str]],
    window: int,
) -> list[Likelihood]:
    """How likely each pair's second text is after its first; long texts in overlapping windows.

    What is judged together follows from the pairs alone, not from their order: every bit is the same again.

    Raises:
        InputError: if a text to be judged is empty.

    """
    plain = PlainText(processor)
    rows = [(i, w) for i, pair in enumerate(pairs) for w in plain.continued(*pair, window)]
    if empty := sorted({*range(len(pairs))} - {i for i, _ in rows}):
        raise InputError(f"text {empty[0]} has nothing to judge: it is empty")
    found: list[Likelihood] = [Likelihood(0.0, 0, greedy=True)] * len(pairs)
    ordered = sorted(rows, key=lambda row: (len(row[1].input_ids), row[1].input_ids, row[1].labels))
    for batch in _batches(ordered):
        told = _judged(model, processor, [encoded for _, encoded in batch])
        for (index, _), one in zip(batch, told, strict=True):
            old = found[index]
            found[index] = replace(
                old,
                nats=old.nats + one.nats,
                tokens=old.tokens + one.tokens,
                greedy=old.greedy and one.greedy,
            )
    return found


def _batches(ordered: Sequence[tuple[int, Encoded]]) -> Iterator[Sequence[tuple[int, Encoded]]]:
    """Rows of rising length, as many at a time as hold `_TOKENS` together."""
    start = 0
    while start < len(ordered):
        end = start + 1
        while end < len(ordered) and (end + 1 - start) * len(ordered[end][1].input_ids) <= _TOKENS:
            end += 1
        yield ordered[start:end]
        start = end


@torch.inference_mode()
def _judged(
    model: VlmixForConditionalGeneration, processor: VlmixProcessor, rows: Sequence[Encoded]
) -> list[Likelihood]:
    batch = processor.collate(rows, padding_side="right")
    labels_BT: Tensor = batch["labels"][:, 1:].to(model.device)
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
    logits_BTV = model(**inputs, use_cache=False).logits[:, :-1].float()
    counted_BT = labels_BT != IGNORED
    nats_BT = F.cross_entropy(logits_BTV.mT, labels_BT, ignore_index=IGNORED, reduction="none")
    best_BT = (logits_BTV.argmax(-1) == labels_BT) | ~counted_BT
    columns = nats_BT.double().sum(1).tolist(), counted_BT.sum(1).tolist(), best_BT.all(1).tolist()
    return [Likelihood(*row) for row in zip(*columns, strict=True)]


def first_word(text: str) -> str:
    """The first word of a continuation, without case and without what is no letter or digit around it."""
    words = text.split()
    return re.sub(r"^\W+|\W+$", "", words[0]).casefold() if words else ""
