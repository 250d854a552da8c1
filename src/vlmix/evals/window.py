"""Watch a model's experts while it answers: every question counts once, prompt and answer, padding not."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from vlmix.core.errors import InputError
from vlmix.core.interfaces import Router
from vlmix.core.sample import Answer, Decoding, Responder, Sample
from vlmix.evals.controls import question_of
from vlmix.evals.plain_text import Likelihood, telling
from vlmix.evals.ties import is_repeated
from vlmix.moe.balance import Positions
from vlmix.moe.recorder import RoutingRecorder, notes_of

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from vlmix.models.modeling import VlmixForConditionalGeneration
    from vlmix.models.processing import VlmixProcessor

EXAMPLES = 3


class RoutingWindow:
    """A recorder that listens to one model.

    Raises:
        InputError: if the model has no experts.

    """

    def __init__(self, model: VlmixForConditionalGeneration, processor: VlmixProcessor) -> None:
        notes = notes_of(model)
        if not any(isinstance(module, Router) for module in model.modules()):
            raise InputError(
                "--routing: this model has no experts, so nothing is routed. Leave --routing out, or give "
                "its recipe a mixture (`model.experts`, or `upcycle` before a stage)"
            )
        self.model, self.processor, self.recorder = model, processor, RoutingRecorder(notes)
        self._stops = torch.tensor(processor.stop_token_ids)
        self._over = torch.zeros(0, dtype=torch.bool)

    @contextmanager
    def open(self) -> Generator[None]:
        """Count every forward pass inside the ``with``; answers are the same, written with a cache."""
        told = cast("GenerationConfig", self.model.generation_config)
        # Some trainers leave a model with the cache switched off: every step then reads all words again.
        before, told.use_cache = told.use_cache, True
        handle = self.model.register_forward_hook(self._saw, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            told.use_cache = before

    def watch(self, responder: Responder) -> Responder:
        """The same responder; a question is counted when it is first asked, and not again in a control."""
        return _Watched(self, responder)

    def show(self, samples: Iterable[Sample], most: int = EXAMPLES) -> list[Sample]:
        """Keep where each patch of a few pictures goes, one picture a task; gives the samples that were kept.

        Of samples with one name, such as two benchmarks may have, the first is kept. Each is asked alone, so
        where a router lets tokens of a batch compete, they compete among themselves.
        """
        kept: list[Sample] = []
        for sample in _one_of_each_task(samples):
            if len(kept) == most:
                break
            if all(sample.id != other.id for other in kept) and self._keep(sample):
                kept.append(sample)
        return kept

    @torch.inference_mode()
    def _keep(self, sample: Sample) -> bool:
        try:
            encoded = self.processor.encode(question_of(sample), supervise=False)
            batch = self.processor.collate([encoded])
        except InputError:
            return False  # it was counted as failed where it was asked
        inputs = {name: tensor.to(self.model.device) for name, tensor in batch.items() if name != "labels"}
        output = self.model(**inputs)
        positions = self._positions(inputs["input_ids"], inputs["attention_mask"].bool())
        self.recorder.keep(sample.id, output.routing or (), positions)
        return True

    def _saw(self, module: Any, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        """One forward pass of ``generate``: the prompts, or one more token of each answer."""
        if is_repeated():
            return
        ids_BT, mask_BT = kwargs["input_ids"], kwargs.get("attention_mask")
        past = output.past_key_values
        again = past is not None and past.get_seq_length() > ids_BT.shape[1]
        if again:
            # A row that is done is fed its end token, then padding, until the last row of its batch is done.
            self._over |= torch.isin(ids_BT[:, -1].cpu(), self._stops)
            real_BT = ~self._over.unsqueeze(1).expand(ids_BT.shape)
        else:
            self._over = torch.zeros(len(ids_BT), dtype=torch.bool)
            # `generate` leaves a mask out that hides nothing.
            real_BT = torch.ones_like(ids_BT, dtype=torch.bool) if mask_BT is None else mask_BT.bool()
        self.recorder.add(output.routing or (), self._positions(ids_BT, real_BT), again=again)

    def _positions(self, ids_BT: Tensor, real_BT: Tensor) -> Positions:
        return Positions(real_BT, ids_BT == self.model.config.image_token_id)


class _Watched:
    def __init__(self, window: RoutingWindow, responder: Responder) -> None:
        self._window, self._responder, self._asked = window, responder, set[tuple[str, str]]()

    def respond(self, samples: Iterable[Sample], decoding: Decoding) -> Iterator[Answer]:
        questions = list(samples)
        # A control asks the same words about another picture.
        words = {(question.id, question.turns[-1].text) for question in questions}
        known = not words.isdisjoint(self._asked)
        self._asked |= words
        with nullcontext() if known else self._window.open():
            yield from self._responder.respond(questions, decoding)

    def likelihoods(
        self, pairs: Sequence[tuple[str, str]], window: int | None = None
    ) -> Iterator[Likelihood]:
        """Not counted: these are no answers."""
        return telling(self._responder).likelihoods(pairs, window)


def _one_of_each_task(samples: Iterable[Sample]) -> Sequence[Sample]:
    """The first sample with a picture of every task, then the second ones."""
    tasks: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.images:
            tasks.setdefault(sample.task, []).append(sample)
    ranked = [(rank, sample) for rows in tasks.values() for rank, sample in enumerate(rows[:EXAMPLES])]
    return cast("list[Sample]", [sample for _, sample in sorted(ranked, key=lambda pair: pair[0])])
