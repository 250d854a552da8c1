"""What answering cost, beside the score: parameters and FLOPs by arithmetic, time and memory as they were.

The arithmetic is that of ``vlmix plan`` and the same on every machine, so it belongs to the results; seconds
and bytes belong to the clock.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Final

import torch

from vlmix.models.configuration import VlmixConfig
from vlmix.models.plan import ModelCost, plan_model

if TYPE_CHECKING:
    from vlmix.evals.run import EvalResult

TEXT_TOKENS: Final = 64
"""Tokens of text that a question is taken to have, as ``vlmix plan`` takes it."""


@dataclass(frozen=True, slots=True)
class RunCost:
    """What one question of a benchmark costs a model, on average.

    ``visual_tokens`` are those of all its ``pictures``; ``answer_tokens`` were counted. The FLOPs, two for
    each multiply-add, are those of reading the question once and of every answer token.
    """

    parameters: int
    active_parameters: int
    weight_bytes: int
    pictures: int
    visual_tokens: int
    text_tokens: int
    answer_tokens: float
    flops: float


def run_costs(folder: Path, results: Sequence[EvalResult]) -> list[RunCost]:
    """Count what a question of each result costs the model in ``folder``, in bf16 on shapes alone.

    All questions of a benchmark are taken to have as many pictures as most of them have.
    """
    config, plans, found = VlmixConfig.from_pretrained(folder), dict[int, ModelCost](), list[RunCost]()
    for result in results:
        pictures = [len(sample.images) for sample in result.samples]
        images = max(sorted(set(pictures)), key=pictures.count)
        if images not in plans:
            plans[images] = plan_model(config, images=images, text_tokens=TEXT_TOKENS)
        found.append(_run_cost(plans[images], result))
    return found


def _run_cost(cost: ModelCost, result: EvalResult) -> RunCost:
    said, images = fmean(answer.tokens for answer in result.model.answers), cost.images
    return RunCost(
        parameters=cost.parameters,
        active_parameters=cost.active,
        weight_bytes=cost.weight_bytes,
        pictures=images,
        visual_tokens=images * cost.vision.tokens,
        text_tokens=TEXT_TOKENS,
        answer_tokens=round(said, 3),
        flops=float(round(cost.prefill_flops + said * cost.decode_flops)),
    )


def timing(result: EvalResult) -> Mapping[str, Any]:
    """Seconds, questions and answer tokens of a result, and the most memory this process held so far."""
    asked = [result.model] + ([result.blind] if result.blind else [])
    seconds, answers = sum(o.seconds for o in asked), sum(len(o.answers) for o in asked)
    working = sum(answer.seconds for outcome in asked for answer in outcome.answers)
    tokens = sum(answer.tokens for outcome in asked for answer in outcome.answers)
    return {
        "batch_size": result.decoding.batch_size,
        "questions": answers,
        "seconds": round(seconds, 3),
        "questions_per_second": round(answers / seconds, 3) if seconds > 0 else None,
        "answer_tokens": tokens,
        "answering_seconds": round(working, 3),
        "tokens_per_second": round(tokens / working, 3) if working > 0 else None,
        "seconds_per_question": round(working / answers, 6) if working > 0 else None,
        "peak_bytes": _peak_bytes(),
        "peak_accelerator_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }


def _peak_bytes() -> int:
    # Linux counts in kibibytes, macOS in bytes.
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
