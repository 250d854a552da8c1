"""What experts gain over a dense model trained the same way: MoE-LLaVA's table 7, in miniature.

For each seed one foundation (pretraining and phase I of the recipe `moe_llava/tiny`) and one dense phase II
are trained; the arms go on from there, all on the same rows in the same order:

  a       experts from phase II on: phases II and III in one, no dense phase before
  b       the recipe: dense phase II, then top-2 of 4 experts in phase III
  c       dense, phases II and III in one
  d       dense phase II, then a dense phase III that trains the same networks as b
  b_top1  as b with one expert a token, weighed by its probability (DeepSpeed): it starts damaged
  b_top1_renormalised  as b with one expert a token of weight 1

Printed: accuracy with 95 % intervals, active parameters, paired differences over the same questions, and the
paper's orderings, a < b and d < b. A run that is whole in the same `--out` is only judged again.
"""

from __future__ import annotations

import argparse
import copy
import platform
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vlmix.cli.flow import judge, open_benchmark
from vlmix.core.files import write_json
from vlmix.core.sample import Score
from vlmix.core.settings import read_settings
from vlmix.evals.statistics import mean_interval, paired_difference
from vlmix.models.mixtures import active_parameters
from vlmix.models.modeling import VlmixForConditionalGeneration
from vlmix.models.plan import parameter_count
from vlmix.train.recipe import Recipe
from vlmix.train.recipe_file import load_recipe
from vlmix.train.run import run_recipe

ARMS = ("a", "b", "c", "d", "b_top1", "b_top1_renormalised")
TOP1 = {"b_top1": False, "b_top1_renormalised": True}


def arm(base: Mapping[str, Any], name: str, folders: Mapping[str, Path]) -> Recipe:
    """The recipe of one arm, which starts from the model in one of ``folders``."""
    raw = copy.deepcopy(dict(base))
    stages = {stage["name"]: stage for stage in raw["stages"]}
    second, third = stages["phase_2"], stages["phase_3"]
    if name in {"a", "c"}:
        chosen = {**second, "steps": second["steps"] + third["steps"]}
        chosen["data"] = [*second["data"], *third["data"]]
        chosen["before"] = third["before"] if name == "a" else []
    else:
        chosen = {**third, "before": [] if name == "d" else third["before"]}
        for upcycle in chosen["before"] if name in TOP1 else []:
            upcycle["experts"]["router"] = {"kind": "topk", "k": 1, "renormalise": TOP1[name]}
    start = folders["foundation" if name in {"a", "c"} else "dense"] / "model"
    chosen["start_from"] = str(start)
    return _with(raw, f"moe_claims_{name}", [chosen], start)


def _with(raw: dict[str, Any], name: str, stages: list[dict[str, Any]], tokenizer: Path | None) -> Recipe:
    raw = {**raw, "name": name, "stages": stages}
    if tokenizer is not None:
        raw["model"] = {**raw["model"], "tokenizer": {"weights": str(tokenizer)}}
    return read_settings(Recipe, raw)


def train_seed(seed: int, out: Path, overrides: list[str], console: Console) -> dict[str, Path]:
    """Foundation, dense phase II and every arm of one seed; returns the arms' run folders."""
    base = load_recipe("moe_llava/tiny", [f"seed={seed}", *overrides]).model_dump(mode="json")
    stages = {stage["name"]: stage for stage in base["stages"]}
    folders = {name: out / f"{name}-{seed}" for name in ("foundation", "dense", *ARMS)}
    _run(
        _with(base, "foundation", [stages["pretrain"], stages["phase_1"]], None),
        folders["foundation"],
        console,
    )
    start = folders["foundation"] / "model"
    second = {**stages["phase_2"], "start_from": str(start)}
    _run(_with(base, "dense", [second], start), folders["dense"], console)
    for name in ARMS:
        _run(arm(base, name, folders), folders[name], console)
    return {name: folders[name] for name in ARMS}


def _run(recipe: Recipe, folder: Path, console: Console) -> None:
    run_recipe(recipe, folder, resume=folder.exists(), console=console)


def scores_of(recipe: Recipe, folder: Path, seed: int) -> list[Score]:
    """The finished model's scores, with ids and groups that tell seeds apart."""
    asked = [(open_benchmark(judged.benchmark), judged.limit) for judged in recipe.evals]
    scores = [score for result in judge(folder, asked) for score in result.model.scores]
    return [replace(s, sample_id=f"{seed}/{s.sample_id}", group=f"{seed}/{s.sample_id}") for s in scores]


def sizes(folder: Path) -> dict[str, int]:
    """Parameters of a finished model, all and those one token meets."""
    model = VlmixForConditionalGeneration.from_pretrained(folder / "model", local_files_only=True)
    return {"parameters": parameter_count(model), "active_parameters": active_parameters(model)}


def main() -> None:
    """Train and judge every arm of every seed; print tables and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/bench-moe-claims"))
    parser.add_argument("overrides", nargs="*", help="recipe settings to change, as key.path=value")
    given = parser.parse_args()
    console = Console()
    scores: dict[str, list[Score]] = {name: [] for name in ARMS}
    rows, counted = [], {}
    recipe = load_recipe("moe_llava/tiny", given.overrides)
    for seed in given.seeds:
        for name, folder in train_seed(seed, given.out, given.overrides, console).items():
            found = scores_of(recipe, folder, seed)
            scores[name] += found
            counted[name] = sizes(folder)
            rows.append({"seed": seed, "arm": name, **asdict(mean_interval(found))})
    report = {"runs": rows, **summary(scores), "sizes": counted, "machine": _machine()}
    _print(console, report)
    write_json(given.out / f"moe_claims-{'-'.join(map(str, given.seeds))}.json", report)


def summary(scores: Mapping[str, list[Score]]) -> dict[str, Any]:
    """Pooled accuracies and paired differences to the recipe's arm."""
    pooled = {name: asdict(mean_interval(found)) for name, found in scores.items()}
    others = [name for name in scores if name != "b"]
    ahead = {name: asdict(paired_difference(scores["b"], scores[name])) for name in others}
    return {"pooled": pooled, "b_ahead_of": ahead}


def _print(console: Console, report: Mapping[str, Any]) -> None:
    for name, interval in report["pooled"].items():
        seeds = "  ".join(f"{row['value']:.1%}" for row in report["runs"] if row["arm"] == name)
        size = report["sizes"][name]
        console.print(
            f"{name:20} {interval['value']:6.1%} [{interval['low']:.1%}, {interval['high']:.1%}]  "
            f"seeds {seeds}  {size['active_parameters']:,} of {size['parameters']:,} parameters active",
            soft_wrap=True,
        )
    for name, gap in report["b_ahead_of"].items():
        verdict = "holds" if gap["low"] > 0 else "reversed" if gap["high"] < 0 else "undecided"
        console.print(
            f"b ahead of {name:20} {100 * gap['value']:+.1f} points [{100 * gap['low']:+.1f}, "
            f"{100 * gap['high']:+.1f}]: {verdict}"
        )


def _machine() -> dict[str, str]:
    return {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}


if __name__ == "__main__":
    main()
