"""Questions a second in judging: one by one, in batches, and one by one through transformers' own `generate`.

The model is the demo's, trained for ``--steps`` steps, so that its answers end by themselves. The questions
are those of `synth_qa`, painted before the clock starts; opening and encoding them is part of every way. The
answers must be the same text for text. Ways take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vlmix.core.sample import Decoding, Sample
from vlmix.evals.benchmarks.synth_qa import SynthQa, SynthQaSettings
from vlmix.evals.controls import question_of
from vlmix.evals.responder import ModelResponder
from vlmix.models.loading import load
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.models.processing import VlmixProcessor
from vlmix.train.recipe_file import load_recipe
from vlmix.train.run import run_recipe

TASKS = ("count", "colour", "shape", "existence", "text_digits", "text_words")
LONGEST, WARM = 16, 8
ALONE, PEER = "vlmix, one by one", "transformers generate, one by one"
Way = Callable[[Sequence[Sample]], list[str]]


def trained(folder: Path, steps: int) -> tuple[VlmixForConditionalGeneration, VlmixProcessor]:
    """The demo's model after a few steps on single questions."""
    changes = [
        f"stages.0.steps={steps}",
        "model.tokenizer.train.samples=300",
        "stages.0.data.0.source.tasks=[colour, shape, existence, count]",
    ]
    recipe = load_recipe("demo", changes)
    recipe = recipe.model_copy(update={"stages": recipe.stages[:1], "evals": []})
    run_recipe(recipe, folder / "run", console=Console(quiet=True))
    return load(folder / "run", "cpu")


def batched(responder: ModelResponder, size: int) -> Way:
    """Ours, ``size`` questions at once."""
    decoding = Decoding(max_new_tokens=LONGEST, batch_size=size)
    return lambda samples: [answer.text for answer in responder.respond(samples, decoding)]


def plain(model: VlmixForConditionalGeneration, processor: VlmixProcessor) -> Way:
    """What a user of transformers writes: template, processor, `generate`, decode."""

    def one(sample: Sample) -> str:
        (turn,) = sample.turns
        content: list[dict[str, Any]] = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image", "image": part.open()}
            for part in turn.parts
        ]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True
        )
        with torch.inference_mode():
            tokens = model.generate(
                **inputs,
                max_new_tokens=LONGEST,
                do_sample=False,
                pad_token_id=processor.tokenizer.pad_token_id,
                eos_token_id=processor.stop_token_ids,
            )
        said = tokens[0, inputs["input_ids"].shape[1] :]
        return processor.tokenizer.decode(said, skip_special_tokens=True).strip()

    return lambda samples: [one(sample) for sample in samples]


def main() -> None:
    """Measure, compare the answers, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, processor = trained(Path(folder), options.steps)
    settings = SynthQaSettings(size=options.questions, image_size=48, difficulty=0, tasks=TASKS)
    samples = [question_of(sample) for sample in SynthQa(settings).samples()]
    responder = ModelResponder(model, processor)
    together = f"vlmix, {options.batch_size} at once"
    ways: dict[str, Way] = {
        together: batched(responder, options.batch_size),
        ALONE: batched(responder, 1),
        PEER: plain(model, processor),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    answers: dict[str, list[str]] = {}
    for turn in range(options.turns):
        for name in list(ways) if turn % 2 else list(ways)[::-1]:
            ways[name](samples[:WARM])
            start = time.perf_counter()
            answers[name] = ways[name](samples)
            rates[name].append(len(samples) / (time.perf_counter() - start))
    same = {name: answers[name] == answers[ALONE] for name in ways}
    ratios = {
        name: statistics.median(a / b for a, b in zip(rates[together], values, strict=True))
        for name, values in rates.items()
    }
    print(f"{'':36} questions/s   {together} is   same answers")
    for name, values in rates.items():
        told = f"{statistics.median(values):11.1f}   {ratios[name]:6.2f} times as fast   "
        print(f"{name:36} {told}{'yes' if same[name] else 'NO'}")
    if options.out:
        setting = {
            "questions": options.questions,
            "batch": options.batch_size,
            "turns": options.turns,
            "steps": options.steps,
            "different_answers": len(set(answers[ALONE])),
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
        }
        middle = {name: statistics.median(values) for name, values in rates.items()}
        report = {"questions_per_second": middle, "ratio": ratios, "same_answers": same, "setting": setting}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
