"""Which of a question's options a model finds likeliest, seeing the pictures."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmix.core.errors import InputError
from vlmix.core.sample import Answer, Choice, Sample, Turn
from vlmix.models.batching import Encoded
from vlmix.models.encoding import IGNORED

if TYPE_CHECKING:
    from vlmix.models.modeling import VlmixForConditionalGeneration
    from vlmix.models.processing import VlmixProcessor


def chosen(
    model: VlmixForConditionalGeneration,
    processor: VlmixProcessor,
    sample: Sample,
    room: int,
    choose: Choice,
) -> Answer:
    """The option that is likeliest as the answer, its end token included, or an answer with ``error`` set.

    ``likelihood`` compares whole options; ``mean_likelihood`` divides by their tokens, as long options are
    less likely for their length alone. Of equals the first is taken. The options of one question are one
    batch, whatever else is asked, so the choice is always the same.
    """
    started = time.perf_counter()
    try:
        nats = option_nats(model, processor, sample, room)
    except InputError as error:
        return Answer(sample.id, "", error=str(error))
    worth = [total / tokens if choose == "mean_likelihood" else total for total, tokens in nats]
    best = min(range(len(worth)), key=lambda place: worth[place])
    return Answer(sample.id, sample.options[best], 0, time.perf_counter() - started)


@torch.inference_mode()
def option_nats(
    model: VlmixForConditionalGeneration, processor: VlmixProcessor, sample: Sample, room: int
) -> list[tuple[float, int]]:
    """For each option, minus the log of how likely it is as the answer, and its tokens.

    Raises:
        InputError: if the question with an option does not fit, or a picture cannot be read.

    """
    rows = [_answered(processor, sample, option, room) for option in sample.options]
    pictures = processor.open_images(rows[0])
    batch = processor.collate(rows, padding_side="right", opened=[pictures] * len(rows))
    labels_BT: Tensor = batch["labels"][:, 1:].to(model.device)
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
    logits_BTV = model(**inputs, use_cache=False).logits[:, :-1].float()
    nats_BT = F.cross_entropy(logits_BTV.mT, labels_BT, ignore_index=IGNORED, reduction="none")
    tokens_B = (labels_BT != IGNORED).sum(1)
    return list(zip(nats_BT.double().sum(1).tolist(), tokens_B.tolist(), strict=True))


def _answered(processor: VlmixProcessor, sample: Sample, option: str, room: int) -> Encoded:
    """The question with this option as its answer; only that is judged, not what was said before."""
    asked = len(processor.encode(sample, supervise=False, max_length=room).input_ids)
    turns = (*sample.turns, Turn("assistant", (option,)))
    whole = processor.encode(replace(sample, turns=turns), supervise=True, max_length=room)
    if whole.dropped_turns or asked >= len(whole.input_ids):
        raise InputError(f"sample {sample.id!r} leaves no room for its option {option[:40]!r}: {room} tokens")
    labels = [IGNORED] * asked + whole.labels[asked:]
    return replace(whole, labels=labels)
