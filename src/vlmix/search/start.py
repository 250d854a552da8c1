"""What all trials begin with: one run of the whole pool, its language model kept as published weights are."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Final

from rich.console import Console

from vlmix.core.files import publish, read_json, write_json
from vlmix.models.loading import load, no_bars
from vlmix.search.compose import WORDS
from vlmix.train.recipe import Recipe
from vlmix.train.records import read_metrics
from vlmix.train.run import run_recipe

_CLOCK: Final = "start.json"


def make_start(recipe: Recipe, folder: Path, log: Path) -> float:
    """Train it in ``folder`` unless it is there, and return the seconds it took when it was made.

    Raises:
        VlmixError: as ``run_recipe``.

    """
    if (folder / _CLOCK).is_file():
        return float(read_json(folder / _CLOCK)["seconds"])
    before = math.fsum(row["seconds"] for row in read_metrics(folder / "metrics.jsonl"))
    begun = time.perf_counter()
    with log.open("a", encoding="utf-8") as words:
        run_recipe(recipe, folder, resume=folder.exists(), console=Console(file=words, width=160))
    model, processor = load(folder, "cpu")
    with publish(folder / WORDS) as new, no_bars():
        model.model.language_model.save_pretrained(new)
        processor.tokenizer.save_pretrained(new)
    seconds = before + time.perf_counter() - begun
    write_json(folder / _CLOCK, {"seconds": seconds})
    return seconds
