"""The round robin over four small eyes: where it stops, what each addition brought, what sharing saved.

The search `round_robin_tiny` is run in `--out`; what was trained there before is not trained again. Printed
and written: the path with intervals, the cost with shared pieces beside the naive one, and a trial that was
run again with nothing shared. The claims are checked: it stops at red and rest, the redundant eye brings too
little, the loud one harms (the interval of what it brings lies below 0), and sharing costs half of the naive
search at most.
"""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path

import torch
from rich.console import Console

from vlmix.core.files import write_json
from vlmix.search import load_grid, run
from vlmix.search.report import Summary, check_sentence, cost_sentence


def claims(summary: Summary) -> dict[str, bool]:
    """What the miniature claims, and whether it came out."""
    gains = {step.point.encoders: step.gain for step in summary.found.path if step.gain is not None}
    redundant, loud = gains[("red", "rest", "again")], gains[("red", "rest", "loud")]
    return {
        "stops_at_red_and_rest": summary.found.best.encoders == ("red", "rest"),
        "redundant_brings_too_little": not redundant.enough,
        "loud_harms": loud.high is not None and loud.high < 0,
        "half_of_naive": summary.cost.ratio <= 0.5,
        "alone_gives_the_same": all(check.same for check in summary.checks),
    }


def main() -> int:
    """Run the search, print a table, write JSON; 1 where a claim fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-search"))
    parser.add_argument("overrides", nargs="*", help="settings of the grid to change, as key.path=value")
    given = parser.parse_args()
    console = Console()
    summary = run(load_grid("round_robin_tiny", given.overrides), given.out / "search", console=console)
    for step in summary.found.path:
        taken, why = ("taken" if step.taken else ""), (step.gain.why if step.gain else "the start")
        console.print(f"{step.point.label:24} {taken:6} {why}", markup=False)
    said = [cost_sentence(summary.cost), *map(check_sentence, summary.checks)]
    found = claims(summary)
    for line in [*said, *(f"{name}: {value}" for name, value in found.items())]:
        console.print(line, markup=False)
    told = summary.to_json()
    told |= {"claims": found, "machine": platform.machine(), "threads": torch.get_num_threads()}
    write_json(given.out / "search.json", {**told, "torch": torch.__version__})
    return 0 if all(found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
