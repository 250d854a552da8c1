"""Pictures a second of this loader beside the field's usual path, and its memory over 10,000 samples.

The usual path is LLaVA's: in the main process, sample by sample, Pillow opens a picture, it is padded to a
square, and CLIP's image processor makes a float tensor of it (transformers' Pillow version, and its
torchvision one beside it). Here worker processes do the same and give 8-bit pixels. Both tokenise the words
of the same LLaVA JSON with JPEG files of 640 x 480. Passes are taken in turns; rates are wall-clock.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from transformers import CLIPImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vlmix.core.batching import BatchingSettings
from vlmix.core.settings import read_settings
from vlmix.core.squares import padded
from vlmix.data.ledger import Ledger
from vlmix.train.build import build_processor, open_source
from vlmix.train.loader import Loader
from vlmix.train.order import DataOrder
from vlmix.train.reading import NamedSource, SampleEncoder, StepReader
from vlmix.train.recipe import Recipe

SIZE, FILES, BATCH, SIDE = (640, 480), 400, 32, 336
MEAN = (122, 116, 104)


def write_pictures(folder: Path, rows: int) -> Path:
    """``FILES`` JPEG files with the detail of photographs, and ``rows`` questions about them."""
    generator = np.random.default_rng(0)
    for number in range(FILES):
        coarse = generator.integers(0, 256, (15, 20, 3), dtype=np.uint8)
        fine = generator.normal(0, 12, (SIZE[1], SIZE[0], 3))
        picture = Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC)
        noisy = np.clip(np.asarray(picture) + fine, 0, 255).astype(np.uint8)
        Image.fromarray(noisy).filter(ImageFilter.GaussianBlur(0.7)).save(
            folder / f"{number}.jpg", quality=90
        )
    talk = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "Colours " * 20}]
    made = [{"id": str(n), "image": f"{n % FILES}.jpg", "conversations": talk} for n in range(rows)]
    (folder / "rows.json").write_text(json.dumps(made), encoding="utf-8")
    return folder / "rows.json"


def recipe(rows: Path) -> Recipe:
    """LLaVA's shape of processor; no model is built."""
    language = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = {"kind": "clip", "image_size": SIDE, "patch_size": 14, "width": 64, "layers": 2, "heads": 2}
    model = {
        "image_size": SIDE,
        "encoders": [clip],
        "fusion": {"kind": "single"},
        "projector": {"kind": "linear"},
        "language_model": {**language, "num_key_value_heads": 2, "intermediate_size": 64},
        "tokenizer": {"train": {"vocab_size": 300, "samples": 8}},
        "chat_template": "vicuna",
    }
    stage = {"name": "only", "train": {"*": 1e-3}, "batch_size": BATCH, "epochs": 1}
    data = [{"source": {"kind": "llava_json", "path": str(rows)}}]
    return read_settings(Recipe, {"name": "loader", "model": model, "stages": [{**stage, "data": data}]})


def ours(what: Recipe, workers: int, epochs: float = 1) -> Callable[[int | None], int]:
    """Reads steps through the loader; gives the number of pictures."""
    processor, source = build_processor(what)[0], open_source(what.stages[0].data[0].source)
    order = DataOrder.plan([len(source)], [None], BATCH, (0, 0), steps=None, epochs=epochs)
    reader = StepReader(
        order, [NamedSource("rows", source)], SampleEncoder(processor), BatchingSettings(), BATCH
    )

    def run(steps: int | None = None, told: Callable[[int], None] | None = None) -> int:
        count = 0
        with Loader(reader, workers=workers, timeout=60) as loader:
            for step in range(steps or loader.steps):
                data = loader.step(step, Ledger(None))
                count += sum(len(batch["pixel_values"]) for batch in data.micro_batches if batch is not None)
                if told is not None:
                    told(count)
        return count

    return run


def usual(rows: Path, processor: Any, tokenizer: Any) -> Callable[[int], int]:
    """One sample after the other in this process."""
    read = json.loads(rows.read_text(encoding="utf-8"))

    def run(steps: int) -> int:
        for step in range(steps):
            pixels, ids = [], []
            for row in read[step * BATCH : (step + 1) * BATCH]:
                image = padded(Image.open(rows.parent / row["image"]).convert("RGB"), MEAN)
                pixels.append(processor(image, return_tensors="pt")["pixel_values"][0])
                ids.append(tokenizer(" ".join(turn["value"] for turn in row["conversations"]))["input_ids"])
            torch.stack(pixels)
        return steps * BATCH

    return run


def resident() -> int:
    """Bytes that this process and its children hold, shared ones once.

    Pages of library files are left out: how many there are to a process depends on who else maps them.
    """
    pids = [os.getpid()]
    children = Path(f"/proc/{pids[0]}/task/{pids[0]}/children").read_text(encoding="ascii").split()
    total = 0
    for pid in [*pids, *map(int, children)]:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
        total += sum(
            int(text.partition(f"{kind}:")[2].split()[0]) * 1024 for kind in ("Pss_Anon", "Pss_Shmem")
        )
    return total


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = write_pictures(Path(folder), options.samples)
        what = recipe(rows)
        tokenizer = build_processor(what)[0].tokenizer
        ways: dict[str, Callable[[int], int]] = {
            "vlmix": ours(what, options.workers),
            "vlmix, no workers": ours(what, 0),
            "usual, Pillow": usual(rows, CLIPImageProcessorPil(size=SIDE, crop_size=SIDE), tokenizer),
            "usual, torchvision": usual(rows, CLIPImageProcessor(size=SIDE, crop_size=SIDE), tokenizer),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(options.turns):
            for name in list(ways) if turn % 2 else list(ways)[::-1]:
                start = time.perf_counter()
                rates[name].append(ways[name](options.steps) / (time.perf_counter() - start))
        memory: list[tuple[int, int]] = []
        ours(what, options.workers)(None, lambda count: memory.append((count, resident())))
    middle = {name: statistics.median(values) for name, values in rates.items()}
    ratios = {
        name: statistics.median(a / b for a, b in zip(rates["vlmix"], values, strict=True))
        for name, values in rates.items()
    }
    for name, rate in middle.items():
        print(f"{name:20} {rate:8.1f} pictures/s   vlmix is {ratios[name]:.2f} times as fast")
    marks = [
        next(held for count, held in memory if count >= options.samples * part // 10) for part in (2, 6, 10)
    ]
    print(
        "memory after 2, 6 and 10 tenths of the samples: " + ", ".join(f"{m / 2**20:.0f} MiB" for m in marks)
    )
    if options.out:
        setting = {
            "workers": options.workers,
            "cores": os.cpu_count(),
            "turns": options.turns,
            "batch": BATCH,
        }
        report = {"pictures_per_second": middle, "ratio": ratios, "memory_bytes": marks, "setting": setting}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
