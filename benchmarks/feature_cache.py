"""An epoch that trains the projector, the first time and with the features of frozen encoders kept.

A CLIP tower and a small decoder, pictures in files, three epochs of one stage: without the cache, with it,
and by a second run that finds the first one's folder. Prints a table and, with ``--out``, writes it as JSON:
seconds of each epoch, whether the metrics agree, what a picture takes on disk, how fast features are read.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from vlmix.core.settings import read_settings
from vlmix.train.feature_store import FeatureStore, place, read_tensors
from vlmix.train.recipe import Recipe
from vlmix.train.records import read_metrics
from vlmix.train.run import run_recipe

SIZES: dict[str, dict[str, int]] = {
    "small": {"side": 168, "patch": 14, "width": 384, "layers": 10, "rows": 32},
    "large": {"side": 336, "patch": 14, "width": 1024, "layers": 24, "rows": 512},
}
EPOCHS, BATCH = 3, 8


def write_rows(folder: Path, count: int, side: int) -> Path:
    """JPEG files of noise that is smooth enough to compress as photographs do, and a short answer to each."""
    draw = np.random.default_rng(0)
    rows = []
    for number in range(count):
        coarse = Image.fromarray(draw.integers(0, 256, (16, 24, 3), dtype=np.uint8))
        coarse.resize((side * 2, side * 3 // 2), Image.Resampling.BICUBIC).save(
            folder / f"{number}.jpg", quality=90
        )
        said = " ".join(draw.choice(["red", "blue", "tall", "small", "near", "far"], 6))
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": said}]
        rows.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns})
    path = folder / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def recipe(data: Path, size: dict[str, int], workers: int, cache: dict[str, Any], keep: bool) -> Recipe:
    """One stage that trains the projector alone."""
    tower = {"kind": "clip", "image_size": size["side"], "patch_size": size["patch"], "width": size["width"]}
    tower |= {"layers": size["layers"], "heads": size["width"] // 64, "mlp": 4 * size["width"]}
    decoder = {"model_type": "llama", "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    decoder |= {"num_key_value_heads": 4, "intermediate_size": 512}
    stage = {
        "name": "align",
        "train": {"projector.*": 1e-3},
        "data": [{"source": {"kind": "llava_json", "path": str(data), "images": str(data.parent)}}],
        "batch_size": BATCH,
        "epochs": EPOCHS,
        "workers": workers,
        "cache_features": keep,
    }
    model = {
        "image_size": size["side"],
        "encoders": [tower],
        "fusion": {"kind": "attention_pool", "window": 2},
        "projector": {"kind": "mlp"},
        "language_model": decoder,
        "tokenizer": {"train": {"vocab_size": 320, "samples": 20}},
        "max_length": 1024,
    }
    raw = {"name": "features", "model": model, "stages": [stage], "feature_cache": cache}
    return read_settings(Recipe, raw)


def epochs(what: Recipe, out: Path, rows: int) -> tuple[list[float], list[tuple[float, float]]]:
    """Seconds of each epoch, and loss and gradient norm of each step."""
    with (out.parent / "log.txt").open("a") as log:
        run_recipe(what, out, console=Console(file=log))
    steps = read_metrics(out / "metrics.jsonl")
    per = rows // BATCH
    seconds = [sum(row["seconds"] for row in steps[i : i + per]) for i in range(0, len(steps), per)]
    return seconds, [(row["loss"], row["grad_norm"]) for row in steps]


def reading(folder: Path) -> dict[str, float]:
    """Writing and reading features of CLIP-L/14 at 336 in bf16: milliseconds and MB/s."""
    features, keys = torch.randn(1, 576, 1024).bfloat16(), [f"{n:064x}" for n in range(64)]
    store = FeatureStore(folder, 10**9, print)
    start = time.perf_counter()
    for key in keys:
        store.write("0" * 32, key, [features])
    written = time.perf_counter()
    for key in keys:
        read_tensors(place(folder, "0" * 32, key), key)
    read = time.perf_counter()
    size = features.numel() * 2 / 1e6
    each = {"write": (written - start) / len(keys), "read": (read - written) / len(keys)}
    milliseconds = {f"{name}_ms": 1e3 * seconds for name, seconds in each.items()}
    return milliseconds | {f"{name}_mb_per_s": size / seconds for name, seconds in each.items()}


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    size = SIZES[given.size]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").mkdir()
        data = write_rows(folder / "data", size["rows"], size["side"])
        cache = {"folder": str(folder / "kept")}
        ways = {"without": ({}, False), "with": (cache, True), "again": (cache, True)}
        found = {
            way: epochs(recipe(data, size, given.workers, *how), folder / way, size["rows"])
            for way, how in ways.items()
        }
        stored = FeatureStore(folder / "kept", 0, print).size()
        speed = reading(folder / "speed")
    result = {
        "sizes": size | {"epochs": EPOCHS, "batch": BATCH, "workers": given.workers},
        "machine": {
            "cpu": platform.processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "seconds": {way: seconds for way, (seconds, _) in found.items()},
        "first_over_cached": found["with"][0][0] / min(found["with"][0][1:]),
        "without_over_cached": min(found["without"][0]) / min(found["with"][0][1:]),
        "first_epoch_of_a_second_run": found["with"][0][0] / found["again"][0][0],
        "metrics_equal": all(metrics == found["without"][1] for _, metrics in found.values()),
        "bytes_per_picture": stored / size["rows"],
        "store": speed,
    }
    for way, (seconds, _) in found.items():
        print(f"{way:8}", *(f"{each:8.2f} s" for each in seconds))
    for name in ("first_over_cached", "without_over_cached", "first_epoch_of_a_second_run", "metrics_equal"):
        print(f"{name:28} {result[name]}")
    print(
        {name: round(value, 2) for name, value in speed.items()},
        f"{result['bytes_per_picture']:.0f} bytes a picture",
    )
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
