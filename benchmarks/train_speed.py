"""Useful tokens a second in training: vlmix beside transformers' own LLaVA under its Trainer.

Same sizes, rows, optimizer and batch size: a CLIP tower (frozen), a projector and a decoder that train, on
rows of mixed length of which a third are text alone. Useful tokens are those of the rows, visual ones
included and padding left out. Each way runs in a process of its own, one epoch, timed from the end of its
first step; ways take turns. The Trainer runs as it comes and once more with its grouping by length; vlmix
with rows padded and with rows packed. The head is small beside the decoder, as in a 7B model, so that what
vlmix saves there does not decide the ratio.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from vlmix.core.interfaces import Source
from vlmix.core.settings import read_settings
from vlmix.core.squares import padded
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.models.processing import VlmixProcessor
from vlmix.train.build import build_processor, open_source
from vlmix.train.recipe import Recipe
from vlmix.train.records import read_metrics
from vlmix.train.run import run_recipe

WORDS, BATCH, MICRO, BUDGET, IGNORED = 2000, 64, 8, 2048, -100
RATE, MEAN = 2e-5, (122, 116, 104)
KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES: dict[str, dict[str, Any]] = {
    "small": {"vision": (256, 1024, 4, 4), "text": (384, 1024, 6, 6), "side": 112, "rows": 192},
    "large": {"vision": (1024, 4096, 24, 16), "text": (2048, 5632, 24, 16), "side": 336, "rows": 512},
}
WAYS = ("Trainer", "Trainer, by length", "vlmix", "vlmix, packed")


def write_rows(folder: Path, count: int, side: int) -> Path:
    """A LLaVA JSON: a third of the rows text alone and longer, the others with a JPEG file; lengths vary."""
    generator = np.random.default_rng(0)
    words = ["".join(generator.choice(list("bdklmnrst"), 2)) + str(n) for n in range(WORDS)]
    rows: list[dict[str, Any]] = []
    for number in range(count):
        shown = number % 3 != 0
        middle, most = (20, 130) if shown else (50, 230)
        length = int(np.clip(generator.lognormal(np.log(middle), 0.9), 4, most))
        answer = " ".join(generator.choice(words, length))
        row = {
            "id": str(number),
            "conversations": [
                {"from": "human", "value": ("<image>\n" if shown else "") + "What is this?"},
                {"from": "gpt", "value": answer},
            ],
        }
        if shown:
            coarse = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
            picture = Image.fromarray(coarse).resize((2 * side, 3 * side // 2), Image.Resampling.BICUBIC)
            picture.save(folder / f"{number}.jpg", quality=90)
            row["image"] = f"{number}.jpg"
        rows.append(row)
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder / "rows.json"


def recipe(rows: Path, size: str, *, packed: bool, workers: int) -> Recipe:
    """The model and an epoch of it."""
    sizes = SIZES[size]
    width, inner, layers, heads = sizes["vision"]
    text = dict(zip(KEYS, sizes["text"], strict=True))
    clip = {"kind": "clip", "image_size": sizes["side"], "patch_size": 14, "width": width, "mlp": inner}
    model = {
        "image_size": sizes["side"],
        "encoders": [{**clip, "layers": layers, "heads": heads}],
        "fusion": {"kind": "single"},
        "projector": {"kind": "mlp", "depth": 2},
        "language_model": {"model_type": "llama", **text, "num_key_value_heads": sizes["text"][3]},
        "tokenizer": {"train": {"vocab_size": WORDS + 300, "samples": 200}},
        "chat_template": "vicuna",
        "max_length": 4096,
    }
    stage = {
        "name": "only",
        "train": {"projector.*": RATE, "language_model.*": RATE},
        "data": [{"source": {"kind": "llava_json", "path": str(rows)}}],
        "batch_size": BATCH,
        "micro_batch_size": MICRO,
        "batching": {"pack": True, "tokens": BUDGET} if packed else {},
        "epochs": 1,
        "precision": "fp32" if _device() == "cpu" else "bf16",
        "workers": workers,
    }
    return read_settings(Recipe, {"name": "speed", "model": model, "stages": [stage]})


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """The same rows for the Trainer: token ids as vlmix makes them, and the pictures' paths."""

    def __init__(self, processor: VlmixProcessor, source: Source) -> None:
        self.encoded = [processor.encode(source[n], supervise=True) for n in range(len(source))]

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> dict[str, Any]:
        found = self.encoded[index]
        images = [image.source for image in found.images]
        return {
            "input_ids": found.input_ids,
            "labels": found.labels,
            "images": images,
            "length": len(found.input_ids),
        }


class Collator:
    """What LLaVA's scripts do: pad to the longest row, open, pad and normalise pictures one by one."""

    def __init__(self, side: int) -> None:
        self.process = CLIPImageProcessor(size=side, crop_size=side)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Several rows as one batch."""
        longest = max(len(row["input_ids"]) for row in rows)

        def filled(name: str, value: int) -> Tensor:
            return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])

        ids, labels = filled("input_ids", 0), filled("labels", IGNORED)
        mask = torch.tensor([[1] * row["length"] + [0] * (longest - row["length"]) for row in rows])
        batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
        images = [padded(Image.open(path).convert("RGB"), MEAN) for row in rows for path in row["images"]]
        if images:
            batch["pixel_values"] = self.process(images, return_tensors="pt")["pixel_values"]
        return batch


class Clock(TrainerCallback):
    """When each optimizer step ended, and the true tokens and positions the model had seen by then."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, int, int]] = []
        self.tokens = self.positions = 0

    def count(self, module: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Tensor]) -> None:
        """Before a forward pass: what is in the batch."""
        self.tokens += int(named["attention_mask"].sum())
        self.positions += named["attention_mask"].numel()

    def on_step_end(self, *given: Any, **named: Any) -> None:
        """Note the time."""
        self.ends.append((time.perf_counter(), self.tokens, self.positions))


def theirs(rows: Path, size: str, folder: Path, *, grouped: bool, workers: int) -> dict[str, float]:
    """An epoch of the Trainer."""
    sizes = SIZES[size]
    processor = build_processor(recipe(rows, size, packed=False, workers=0))[0]
    data = Rows(processor, open_source({"kind": "llava_json", "path": str(rows)}))
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            **dict(zip(KEYS, sizes["vision"], strict=True)), image_size=sizes["side"], patch_size=14
        ),
        text_config=LlamaConfig(
            vocab_size=len(processor.tokenizer),
            max_position_embeddings=4096,
            **dict(zip(KEYS, sizes["text"], strict=True)),
        ),
        image_token_index=processor.image_token_id,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.requires_grad_(False)
    clock, collator = Clock(), Collator(sizes["side"])
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=BATCH // MICRO,
        num_train_epochs=1,
        learning_rate=RATE,
        train_sampling_strategy="group_by_length" if grouped else "random",
        dataloader_num_workers=workers,
        remove_unused_columns=False,
        use_cpu=_device() == "cpu",
        bf16=_device() != "cpu",
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    model.register_forward_pre_hook(clock.count, with_kwargs=True)
    Trainer(model, arguments, data_collator=collator, train_dataset=data, callbacks=[clock]).train()
    first, last = clock.ends[0], clock.ends[-1]
    seconds, tokens, positions = (after - before for before, after in zip(first, last, strict=True))
    return _told(int(tokens), int(positions), seconds, sum(p.numel() for p in model.parameters()))


def ours(rows: Path, size: str, folder: Path, *, packed: bool, workers: int) -> dict[str, float]:
    """An epoch of vlmix, as ``vlmix train`` runs them."""
    what = recipe(rows, size, packed=packed, workers=workers)
    out = folder / ("packed" if packed else "padded")
    with (folder / "console.txt").open("w", encoding="utf-8") as quiet:
        model = run_recipe(what, out, console=Console(file=quiet))
    steps = read_metrics(out / "metrics.jsonl")
    count = sum(p.numel() for p in VlmixForConditionalGeneration.from_pretrained(model).parameters())
    sums = [sum(step[name] for step in steps[1:]) for name in ("tokens", "positions", "seconds")]
    return _told(int(sums[0]), int(sums[1]), sums[2], count)


def one(way: str, rows: Path, size: str, folder: Path, workers: int) -> dict[str, float]:
    """Run one way in this process, with its peak memory."""
    if _device() != "cpu":
        torch.accelerator.reset_peak_memory_stats()
    if way.startswith("Trainer"):
        found = theirs(rows, size, folder, grouped="length" in way, workers=workers)
    else:
        found = ours(rows, size, folder, packed="packed" in way, workers=workers)
    return {**found, "peak_bytes": _peak()}


def table(runs: dict[str, list[dict[str, float]]]) -> tuple[str, dict[str, Any]]:
    """The report as text and as figures."""
    peer = [run["tokens"] / run["seconds"] for run in runs[WAYS[0]]]
    lines = [f"{'':20}{'tokens/s':>10}{'ratio':>8}   {'turns':16}{'padding':>8}{'peak, MiB':>11}"]
    report: dict[str, Any] = {}
    for way, turns in runs.items():
        rates = [run["tokens"] / run["seconds"] for run in turns]
        ratios = sorted(mine / other for mine, other in zip(rates, peer, strict=True))
        waste = 1 - sum(run["tokens"] for run in turns) / sum(run["positions"] for run in turns)
        peak = max(run["peak_bytes"] for run in turns)
        report[way] = {
            "useful_tokens_per_second": statistics.median(rates),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "padding": waste,
            "peak_bytes": peak,
            "parameters": turns[0]["parameters"],
        }
        span = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        lines.append(
            f"{way:20}{statistics.median(rates):10.0f}{statistics.median(ratios):8.2f}   "
            f"{span:16}{waste:8.1%}{peak / 2**20:11.0f}"
        )
    return "\n".join(lines), report


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=tuple(SIZES), default="small")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if options.way:
            print(json.dumps(one(options.way, options.rows, options.size, folder, options.workers)))
            return
        rows = write_rows(folder, SIZES[options.size]["rows"], SIZES[options.size]["side"])
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for turn in range(options.turns):
            for way in WAYS if turn % 2 else WAYS[::-1]:
                command = [
                    sys.executable,
                    __file__,
                    "--size",
                    options.size,
                    "--way",
                    way,
                    "--rows",
                    str(rows),
                ]
                done = subprocess.run(
                    [*command, "--workers", str(options.workers)],
                    check=True,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                runs[way].append(json.loads(done.stdout.splitlines()[-1]))
    text, report = table(runs)
    print(text)
    if options.out:
        setting = {
            "size": options.size,
            "device": _device(),
            "threads": torch.get_num_threads(),
            "workers": options.workers,
            "turns": options.turns,
            "torch": torch.__version__,
            "machine": platform.machine(),
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({**report, "setting": setting}, indent=2) + "\n", encoding="utf-8")


def _told(tokens: int, positions: int, seconds: float, parameters: int) -> dict[str, float]:
    return {"tokens": tokens, "positions": positions, "seconds": seconds, "parameters": parameters}


def _device() -> str:
    device = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if device is None else device.type


def _peak() -> int:
    if _device() != "cpu":
        return torch.accelerator.max_memory_allocated()
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


if __name__ == "__main__":
    main()
