"""Who answers: a model on this machine, or a table of answers made elsewhere."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from vlmix.core.errors import InputError
from vlmix.core.sample import Answer, Decoding, Sample
from vlmix.evals.answering import in_order
from vlmix.evals.choosing import chosen
from vlmix.evals.plain_text import Likelihood, PlainText, likelihoods
from vlmix.evals.ties import Ties, one_thread, repeating, stands_alone

if TYPE_CHECKING:
    from vlmix.models.batching import Encoded, Opened
    from vlmix.models.modeling import VlmixForConditionalGeneration
    from vlmix.models.processing import VlmixProcessor

_BATCHES_AT_ONCE = 8
"""Samples are sorted by length among this many batches, so that little of a batch is padding."""


class ModelResponder:
    """A model that answers in batches; an answer depends on neither its batch nor its place in the order.

    Greedy answers are written in batches, and those that were chosen by a hair once more alone (see `ties`).
    Beams, drawn answers and models whose rows compete for experts are asked one question at a time.

    The model is put in eval mode and stays there. An answer may take half of the context at most. A sample
    that cannot be read, or leaves no room for its answer, gets an answer with ``error`` set. Above
    temperature 0 what is drawn depends on ``seed`` and the sample's id.
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
        return in_order(self.batches(list(samples), decoding))

    def batches(self, samples: Sequence[Sample], decoding: Decoding) -> Iterator[Mapping[int, Answer]]:
        """The answers of one batch at a time, by the place of their sample."""
        window = decoding.batch_size * _BATCHES_AT_ONCE
        for start in range(0, len(samples), window):
            for batch in self._answered(samples[start : start + window], decoding):
                yield {start + place: answer for place, answer in batch.items()}

    def likelihoods(
        self, pairs: Sequence[tuple[str, str]], window: int | None = None
    ) -> Iterator[Likelihood]:
        """For each pair, in order, how likely the second text is right after the first, outside any template.

        Texts longer than ``window`` tokens (the context at most) are judged piece by piece; each piece sees
        at least half a window before it. The same pairs, in any order, give the same bits.

        Raises:
            InputError: if a text to be judged is empty.

        """
        longest = min(window or self._context, self._context)
        return iter(likelihoods(self.model, self.processor, pairs, longest))

    def _answered(self, samples: Sequence[Sample], decoding: Decoding) -> Iterator[Mapping[int, Answer]]:
        failed: dict[int, Answer] = {}
        encoded: dict[int, Encoded] = {}
        decoding = self._fitted(decoding)
        room = self._context - decoding.max_new_tokens
        for place, sample in enumerate(samples):
            if decoding.choose != "text" and sample.options:
                yield {place: chosen(self.model, self.processor, sample, self._context, decoding.choose)}
                continue
            try:
                encoded[place] = self._encoded(sample, room, plain=decoding.plain)
            except InputError as error:
                failed[place] = Answer(sample.id, "", error=str(error))
        yield failed
        order = sorted(encoded, key=lambda place: len(encoded[place].input_ids))
        for start in range(0, len(order), decoding.batch_size):
            batch = {place: encoded[place] for place in order[start : start + decoding.batch_size]}
            yield self._answer_batch(batch, decoding)

    def _encoded(self, sample: Sample, room: int, *, plain: bool) -> Encoded:
        if plain:
            return PlainText(self.processor).prompt(sample.turns[-1].text, room, sample.id)
        return self.processor.encode(sample, supervise=False, max_length=room)

    def _answer_batch(self, batch: Mapping[int, Encoded], decoding: Decoding) -> Mapping[int, Answer]:
        started = time.perf_counter()
        answers: dict[int, Answer] = {}
        opened: dict[int, Opened] = {}
        for place, encoded in batch.items():
            try:
                opened[place] = self.processor.open_images(encoded)
            except InputError as error:
                answers[place] = Answer(encoded.sample_id, "", error=str(error))
        rows = {place: (batch[place], pictures) for place, pictures in opened.items()}
        said = self._said(rows, decoding)
        seconds = (time.perf_counter() - started) / len(batch)
        for place, tokens in said.items():
            text = self.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
            answers[place] = Answer(batch[place].sample_id, text, len(tokens), seconds)
        return answers

    def _said(
        self, rows: Mapping[int, tuple[Encoded, Opened]], decoding: Decoding
    ) -> Mapping[int, list[int]]:
        """The tokens of each answer, its end left out, as if each question had been asked alone."""
        greedy = decoding.temperature == 0 and decoding.beams == 1
        if not rows or not greedy or stands_alone(self.model):
            return {place: self._generate([row], decoding)[0][0] for place, row in rows.items()}
        together, close = self._generate(list(rows.values()), decoding)
        said = dict(zip(rows, together, strict=True))
        if len(rows) > 1:
            with repeating(), one_thread(self.model.device):
                for place in (place for place, is_close in zip(rows, close, strict=True) if is_close):
                    said[place] = self._generate([rows[place]], decoding)[0][0]
        return said

    @property
    def _context(self) -> int:
        """Tokens that prompt and answer may have together."""
        context = self.model.config.language.max_position_embeddings
        return min(context, self.processor.max_length or context)

    def _fitted(self, decoding: Decoding) -> Decoding:
        """An answer may take half of the context at most, whatever was asked for."""
        return replace(decoding, max_new_tokens=min(decoding.max_new_tokens, self._context // 2))

    @torch.inference_mode()
    def _generate(
        self, rows: Sequence[tuple[Encoded, Opened]], decoding: Decoding
    ) -> tuple[list[list[int]], list[bool]]:
        """The tokens of each row, its end left out, and whether they were chosen by a hair."""
        encoded, opened = zip(*rows, strict=True)
        inputs = self.processor.collate(encoded, padding_side="left", opened=opened)
        on_device = {
            name: tensor.to(self.model.device) for name, tensor in inputs.items() if name != "labels"
        }
        ends = self.processor.stop_token_ids
        ties = Ties(self.model, len(rows), ends)
        greedy = decoding.temperature == 0
        drawn = {} if greedy else {"temperature": decoding.temperature}
        with torch.random.fork_rng(enabled=not greedy), ties.watching():
            if not greedy:
                torch.manual_seed(_seed_of(self.seed, encoded[0].sample_id))
            tokens_BT: Tensor = cast("Any", self.model).generate(
                **on_device,
                max_new_tokens=decoding.max_new_tokens,
                num_beams=decoding.beams,
                pad_token_id=self.processor.tokenizer.pad_token_id,
                eos_token_id=ends,
                do_sample=not greedy,
                suppress_tokens=[self.model.config.image_token_id],  # nobody shows a picture in an answer
                logits_processor=[ties] if greedy and decoding.beams == 1 else None,
                **drawn,
            )
        prompt = on_device["input_ids"].shape[1]
        said = [
            list(takewhile(lambda token: token not in ends, row)) for row in tokens_BT[:, prompt:].tolist()
        ]
        return said, ties.close.tolist()


def _seed_of(seed: int, sample_id: str) -> int:
    """What a question's draws start from, whatever is asked beside it."""
    return int.from_bytes(hashlib.sha256(f"{seed} {sample_id}".encode()).digest()[:8], "big")


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
