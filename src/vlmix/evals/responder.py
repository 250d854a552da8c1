"""Who answers: a model on this machine, or a table of answers made elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from vlmix.core.errors import InputError
from vlmix.core.sample import Answer, Decoding, Sample
from vlmix.evals.plain_text import Likelihood, PlainText, likelihoods

if TYPE_CHECKING:
    from vlmix.models.batching import Encoded, Opened
    from vlmix.models.modeling import VlmixForConditionalGeneration
    from vlmix.models.processing import VlmixProcessor

_BATCHES_AT_ONCE = 8
"""Samples are sorted by length among this many batches, so that little of a batch is padding."""


class ModelResponder:
    """A model that answers in batches; an answer depends on neither its batch nor its place in the order.

    The model is put in eval mode and stays there. An answer may take half of the context at most. A sample
    that cannot be read, or leaves no room for its answer, gets an answer with ``error`` set. Above
    temperature 0, ``seed`` fixes what is drawn, but the draws then depend on the batch.
    """

    def __init__(
        self,
        model: VlmixForConditionalGeneration,
        processor: VlmixProcessor,
        seed: int = 0,
    ) -> None:
        self.model, self.processor, self.seed = model.eval(), processor, seed

    def respond(self, samples: Iterable[Sample], decoding: Decoding) -> Iterator[Answer]:
        """Yield one answer for each sample, in order; pictures are open for one batch at a time."""
        stream = iter(samples)
        while window := list(islice(stream, decoding.batch_size * _BATCHES_AT_ONCE)):
            yield from self._answer(window, decoding)

    def _answer(self, samples: Sequence[Sample], decoding: Decoding) -> list[Answer]:
        answers: dict[int, Answer] = {}
        encoded: dict[int, Encoded] = {}
        decoding = self._fitted(decoding)
        room = self._context - decoding.max_new_tokens
        for index, sample in enumerate(samples):
            try:
                encoded[index] = self._encoded(sample, room, plain=decoding.plain)
            except InputError as error:
                answers[index] = Answer(sample.id, "", error=str(error))
        order = sorted(encoded, key=lambda index: len(encoded[index].input_ids))
        for start in range(0, len(order), decoding.batch_size):
            batch = {index: encoded[index] for index in order[start : start + decoding.batch_size]}
            answers |= self._answer_batch(batch, decoding)
        return [answers[index] for index in range(len(samples))]

    def _encoded(self, sample: Sample, room: int, *, plain: bool) -> Encoded:
        if plain:
            return PlainText(self.processor).prompt(sample.turns[-1].text, room, sample.id)
        return self.processor.encode(sample, supervise=False, max_length=room)

    def likelihoods(
        self, pairs: Sequence[tuple[str, str]], batch_size: int = 64, window: int | None = None
    ) -> Iterator[Likelihood]:
        """For each pair, in order, how likely the second text is right after the first, outside any template.

        Texts longer than ``window`` tokens (the context at most) are judged piece by piece; each piece sees
        at least half a window before it.

        Raises:
            InputError: if a text to be judged is empty.

        """
        longest = min(window or self._context, self._context)
        for start in range(0, len(pairs), batch_size * _BATCHES_AT_ONCE):
            some = pairs[start : start + batch_size * _BATCHES_AT_ONCE]
            yield from likelihoods(self.model, self.processor, some, batch_size, longest)

    def _answer_batch(self, batch: Mapping[int, Encoded], decoding: Decoding) -> Mapping[int, Answer]:
        started = time.perf_counter()
        answers: dict[int, Answer] = {}
        opened: dict[int, Opened] = {}
        for index, encoded in batch.items():
            try:
                opened[index] = self.processor.open_images(encoded)
            except InputError as error:
                answers[index] = Answer(encoded.sample_id, "", error=str(error))
        if not opened:
            return answers
        inputs = self.processor.collate(
            [batch[index] for index in opened], padding_side="left", opened=list(opened.values())
        )
        texts = self._generate(inputs, decoding)
        seconds = (time.perf_counter() - started) / len(batch)
        for index, (text, tokens) in zip(opened, texts, strict=True):
            answers[index] = Answer(batch[index].sample_id, text, tokens, seconds)
        return answers

    @property
    def _context(self) -> int:
        """Tokens that prompt and answer may have together."""
        context = self.model.config.language.max_position_embeddings
        return min(context, self.processor.max_length or context)

    def _fitted(self, decoding: Decoding) -> Decoding:
        """An answer may take half of the context at most, whatever was asked for."""
        return replace(decoding, max_new_tokens=min(decoding.max_new_tokens, self._context // 2))

    @torch.inference_mode()
    def _generate(self, inputs: Mapping[str, Tensor], decoding: Decoding) -> list[tuple[str, int]]:
        """The text of each row and its length in tokens, the end token not counted."""
        on_device = {
            name: tensor.to(self.model.device) for name, tensor in inputs.items() if name != "labels"
        }
        drawn = {"do_sample": True, "temperature": decoding.temperature} if decoding.temperature > 0 else {}
        with torch.random.fork_rng(enabled=bool(drawn)):
            if drawn:
                torch.manual_seed(self.seed)
            tokens_BT: Tensor = cast("Any", self.model).generate(
                **on_device,
                max_new_tokens=decoding.max_new_tokens,
                num_beams=decoding.beams,
                pad_token_id=self.processor.tokenizer.pad_token_id,
                eos_token_id=self.processor.stop_token_ids,
                **(drawn or {"do_sample": False}),
            )
        prompt = on_device["input_ids"].shape[1]
        ends = set(self.processor.stop_token_ids)
        rows = [
            list(takewhile(lambda token: token not in ends, row)) for row in tokens_BT[:, prompt:].tolist()
        ]
        return [
            (self.processor.tokenizer.decode(row, skip_special_tokens=True).strip(), len(row)) for row in rows
        ]


class CannedResponder:
    """Answers by sample id, made elsewhere; a sample without one gets an answer with ``error`` set."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self.texts = texts

    def respond(self, samples: Iterable[Sample], decoding: Decoding) -> Iterator[Answer]:
        """Yield one answer for each sample, in order; ``decoding`` has no say in answers already made."""
        del decoding
        for sample in samples:
            if sample.id in self.texts:
                yield Answer(sample.id, self.texts[sample.id])
            else:
                yield Answer(sample.id, "", error=f"no answer was given for sample {sample.id!r}")
