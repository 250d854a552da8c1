"""Patch mining against its own low-resolution eye alone, at the same number of visual tokens.

The recipe `mining_claim` is trained twice for each seed: as it is, and with `fusion: single` and the first
encoder only. Both see the same rows in the same order. Printed: accuracy on small text with 95 % intervals,
and the paired difference over the same questions. A seed that was trained before, in the same
`--out` with the same settings, is only judged again.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console

from vlmix.cli.flow import judge, open_benchmark
from vlmix.core.files import write_json
from vlmix.core.sample import Score
from vlmix.evals.statistics import mean_interval, paired_difference
from vlmix.train.recipe import Recipe
from vlmix.train.recipe_file import load_recipe
from vlmix.train.run import run_recipe


def arms(seed: int, overrides: list[str]) -> dict[str, Recipe]:
    """The two recipes of one seed."""
    mining = load_recipe("mining_claim", [f"seed={seed}", *overrides])
    first = json.dumps([mining.model.encoders[0]])
    alone = ["model.fusion={kind: single}", f"model.encoders={first}"]
    return {
        "single": load_recipe("mining_claim", [f"seed={seed}", *overrides, *alone]),
        "patch_mining": mining,
    }


def scores_of(recipe: Recipe, folder: Path, seed: int, console: Console) -> list[Score]:
    """Train or go on training, judge, and return the scores with ids and groups that tell seeds apart."""
    run_recipe(recipe, folder, resume=folder.exists(), console=console)
    asked = [(open_benchmark(judged.benchmark), judged.limit) for judged in recipe.evals]
    scores = [score for result in judge(folder, asked) for score in result.model.scores]
    return [replace(s, sample_id=f"{seed}/{s.sample_id}", group=f"{seed}/{s.sample_id}") for s in scores]


def main() -> None:
    """Run every seed and both arms; print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/bench-mining"))
    parser.add_argument("overrides", nargs="*", help="recipe settings to change, as key.path=value")
    given = parser.parse_args()
    console = Console()
    scores: dict[str, list[Score]] = {"single": [], "patch_mining": []}
    rows = []
    for seed in given.seeds:
        for name, recipe in arms(seed, given.overrides).items():
            found = scores_of(recipe, given.out / f"{name}-{seed}", seed, console)
            scores[name] += found
            interval = mean_interval(found)
            rows.append({"seed": seed, "fusion": name, **asdict(interval)})
            console.print(
                f"seed {seed}  {name:13}  {interval.value:6.1%}  [{interval.low:.1%}, {interval.high:.1%}]"
            )
    pooled = {name: asdict(mean_interval(found)) for name, found in scores.items()}
    gap = paired_difference(scores["patch_mining"], scores["single"])
    for name, interval in pooled.items():
        console.print(f"{name:13} {interval['value']:6.1%}  [{interval['low']:.1%}, {interval['high']:.1%}]")
    console.print(
        f"mining ahead by {100 * gap.value:.1f} points  [{100 * gap.low:.1f}, {100 * gap.high:.1f}]"
    )
    machine = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    write_json(
        given.out / "mining_claim.json",
        {"runs": rows, "pooled": pooled, "difference": asdict(gap), **machine},
    )


if __name__ == "__main__":
    main()
