"""Eagle's four findings on fusing encoders (arXiv:2408.15998), in miniature, judged by a rule set before.

Two small eyes that see different things (``fusion_world``), joined in six ways and each alone; eyes frozen or
trained with the rest; aligned alone before the frozen decoder first, or not. All arms of a seed see as many
batches, the same rows in the same order where their stages are the same, and read the same sheets in the end;
fusion and projector are drawn anew. Seeds share what stands in for published weights, as the paper's arms do.

The rate of trained eyes is chosen on a seed that counts for nothing. A finding is `reproduced` where the
paired interval over all seeds' sheets lies above 0 and every seed agrees in sign, `not reproduced` where
it lies below, else `undecided`; fewer than three seeds decide nothing. `channel_concat` is competitive where
it is not MARGIN behind the best other fusion by the same rule, and best in efficiency where no fusion takes
fewer multiply-adds or visual tokens.
A training whose result stands in `--out` is not repeated; `--jobs 0` trains nothing and judges what is there.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from fusion_world import ARMS, EYES, FUSIONS, KINDS, STARTS, Arm, Sizes, align, cost, start, train, words

from vlmix.core.files import write_json, write_text
from vlmix.core.sample import Score
from vlmix.evals.statistics import Interval, mean_interval, paired_difference

RATES: Final = (3e-4, 1e-3)
MARGIN: Final = 0.03
LEAST_SEEDS: Final = 3
JOINED: Final = tuple(name for name in FUSIONS if not name.endswith(" alone"))
ALONE: Final = tuple(name for name in FUSIONS if name.endswith(" alone"))
Row = Mapping[str, Any]
Rows = Mapping[tuple[int, Arm], Row]
FINDINGS: Final = (
    "unfreezing helps",
    "channel concatenation competes",
    "more encoders help",
    "alignment before helps",
)


@dataclass(frozen=True, slots=True)
class Claim:
    """A comparison: ``more`` should read more words than ``less``, paired arm by arm.

    With ``margin`` it is enough that it reads no more than that much less. A finding's ``main`` comparison
    decides about it; the others are told beside it.
    """

    finding: str
    told: str
    more: tuple[Arm, ...]
    less: tuple[Arm, ...]
    main: bool = False
    margin: float = 0.0


class Results:
    """The trainings of one folder by seed, arm and settings: one line each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.rows = {self._key(row): row for row in map(json.loads, lines)}

    def find(self, seed: int, arm: Arm, sizes: Sizes) -> Row | None:
        """The result of one training, if it is there."""
        return self.rows.get((seed, arm.name, sizes.digest))

    def add(self, row: Row) -> None:
        """Keep a result."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(row)) + "\n")
        self.rows[self._key(row)] = row

    @staticmethod
    def _key(row: Row) -> tuple[int, str, str]:
        return row["seed"], row["arm"], row["settings"]


class Workers:
    """Whoever trains; what is done already is not done again, and without a ``pool`` nothing is."""

    def __init__(self, pool: Executor | None, folder: Path) -> None:
        self.pool, self.folder = pool, folder
        self.results = Results(folder / "runs.jsonl")

    def prepare(self, pool: Executor, seed: int, sizes: Sizes) -> None:
        """What stands in for published weights, and the seed's aligned eyes."""
        pool.submit(words, sizes, self.folder).result()
        for made in (
            [pool.submit(start, what, sizes, self.folder) for what in STARTS],
            [pool.submit(align, name, seed, sizes, self.folder) for name in EYES],
        ):
            for future in made:
                future.result()

    def train(self, seed: int, arms: Sequence[Arm], sizes: Sizes) -> None:
        """Every arm that is not there yet."""
        missing = [arm for arm in arms if self.results.find(seed, arm, sizes) is None]
        if self.pool is None or not missing:
            return
        self.prepare(self.pool, seed, sizes)
        running = [self.pool.submit(train, arm, seed, sizes, self.folder) for arm in missing]
        for future in as_completed(running):
            row = future.result()
            self.results.add(row)
            print(f"seed {seed:<4} {row['arm']:50} {share(row):6.1%}  {row['cpu_seconds']:.0f} s", flush=True)


def sweep(workers: Workers, seed: int, sizes: Sizes) -> dict[str, float]:
    """Accuracy of channel concatenation with eyes that train at each rate, aligned and not, averaged."""
    arms = [Arm("channel_concat", unfrozen=True, aligned=aligned) for aligned in (False, True)]
    table: dict[str, float] = {}
    for rate in RATES:
        tried = replace(sizes, eye_rate=rate)
        workers.train(seed, arms, tried)
        rows = [workers.results.find(seed, arm, tried) for arm in arms]
        table[f"{rate:g}"] = statistics.mean(share(row) for row in rows if row)
    return table


def claims(rows: Rows) -> list[Claim]:
    """The paper's four findings, as far as their arms are there for every seed.

    What is compared with the best is compared with the best on these rows.
    """
    there = complete(rows)

    def cells(fusions: Sequence[str], *, unfrozen: bool, aligned: bool = False) -> tuple[Arm, ...]:
        return tuple(Arm(name, unfrozen, aligned) for name in fusions)

    def best(fusions: Sequence[str], *, unfrozen: bool, aligned: bool) -> str:
        return max(fusions, key=lambda name: _accuracy(rows, Arm(name, unfrozen, aligned)))

    found: list[Claim] = []
    for aligned in (False, True):
        kind = "aligned" if aligned else "not aligned"
        found.append(
            Claim(
                "unfreezing helps",
                f"six fusions, {kind}: unfrozen over frozen",
                cells(JOINED, unfrozen=True, aligned=aligned),
                cells(JOINED, unfrozen=False, aligned=aligned),
                main=not aligned,
            )
        )
    for unfrozen, aligned in ((True, False), (True, True), (False, False), (False, True)):
        kind = f"{'unfrozen' if unfrozen else 'frozen'}, {'aligned' if aligned else 'not aligned'}"
        main = unfrozen and not aligned
        if not {*cells(tuple(FUSIONS), unfrozen=unfrozen, aligned=aligned)} <= there:
            continue
        concat = cells(["channel_concat"], unfrozen=unfrozen, aligned=aligned)
        others = [name for name in JOINED if name != "channel_concat"]
        other = best(others, unfrozen=unfrozen, aligned=aligned)
        single = best(ALONE, unfrozen=unfrozen, aligned=aligned)
        rival = cells([other], unfrozen=unfrozen, aligned=aligned)
        said = f"{kind}: channel_concat over {other}"
        found.append(Claim("channel concatenation competes", said, concat, rival, main, MARGIN))
        lone = cells([single], unfrozen=unfrozen, aligned=aligned)
        said = f"{kind}: channel_concat over {single}"
        found.append(Claim("more encoders help", said, concat, lone, main))
        every = cells(JOINED, unfrozen=unfrozen, aligned=aligned)
        said = f"{kind}: six fusions over {single}"
        found.append(Claim("more encoders help", said, every, lone * len(every)))
    for unfrozen in (True, False):
        kind = "unfrozen" if unfrozen else "frozen"
        said = f"six fusions, {kind}: aligned over not aligned"
        after = cells(JOINED, unfrozen=unfrozen, aligned=True)
        before = cells(JOINED, unfrozen=unfrozen, aligned=False)
        found.append(Claim("alignment before helps", said, after, before, main=unfrozen))
    return [claim for claim in found if {*claim.more, *claim.less} <= there]


def complete(rows: Rows) -> set[Arm]:
    """The arms that every seed has."""
    seeds = {seed for seed, _ in rows}
    return {arm for arm in ARMS if all((seed, arm) in rows for seed in seeds)}


def judged(claim: Claim, rows: Rows) -> dict[str, Any]:
    """The paired difference over all seeds' sheets and over each seed's, and what it says of the claim."""
    seeds = sorted({seed for seed, _ in rows})
    single = {seed: _gap(claim, rows, [seed]) for seed in seeds}
    pooled = _gap(claim, rows, seeds)
    told = asdict(claim) | {"more": [arm.name for arm in claim.more], "less": [a.name for a in claim.less]}
    told |= {"pooled": asdict(pooled), "seeds": {str(seed): asdict(gap) for seed, gap in single.items()}}
    return told | {"verdict": verdict(pooled, [gap.value for gap in single.values()], claim.margin)}


def verdict(pooled: Interval, seeds: Sequence[float], margin: float = 0.0) -> str:
    """What the rule says; with ``margin`` the paper's direction is to be no more than that behind."""
    if len(seeds) < LEAST_SEEDS:
        return "too few seeds"
    if pooled.low > -margin and all(gap > -margin for gap in seeds):
        return "reproduced"
    return "not reproduced" if pooled.high < -margin else "undecided"


def efficient(costs: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether no other fusion takes fewer visual tokens or multiply-adds than channel concatenation."""
    ours = costs["channel_concat"]
    figures = ("visual_tokens", "multiply_adds")
    return all(ours[figure] <= costs[name][figure] for name in JOINED for figure in figures)


def findings(rows: Rows, costs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Each finding with its comparisons and its verdict: the main one's, and for efficiency the count's."""
    found: dict[str, Any] = {name: {"verdict": "not run", "comparisons": []} for name in FINDINGS}
    for told in (judged(claim, rows) for claim in claims(rows)):
        entry = found[told["finding"]]
        entry["comparisons"].append(told)
        entry["verdict"] = told["verdict"] if told["main"] else entry["verdict"]
    concat = found["channel concatenation competes"]
    concat["best_efficiency"] = efficient(costs)
    if concat["comparisons"] and not concat["best_efficiency"]:
        concat["verdict"] = "not reproduced"
    return found


def _gap(claim: Claim, rows: Rows, seeds: Sequence[int]) -> Interval:
    """Paired over words; all of one sheet are drawn together."""
    sides = [
        [
            score
            for seed in seeds
            for place, arm in enumerate(arms)
            for score in _scores(rows, seed, arm, place)
        ]
        for arms in (claim.more, claim.less)
    ]
    return paired_difference(*sides)


def _scores(rows: Rows, seed: int, arm: Arm, place: int = 0) -> list[Score]:
    """A score for every word; those of one sheet belong together, whatever arm reads it."""
    row = rows[seed, arm]
    sheets = enumerate(zip(row["right"].split(), row["kinds"].split(), strict=True))
    return [
        Score(f"{seed}/{place}/{sheet}/{i}", float(hit), "", KINDS[int(kind)], f"{seed}/{sheet}")
        for sheet, (right, kinds) in sheets
        for i, (hit, kind) in enumerate(zip(right, kinds, strict=True))
    ]


def share(row: Row) -> float:
    """The share of words read right in one training."""
    return row["right"].count("1") / (row["right"].count("1") + row["right"].count("0"))


def _accuracy(rows: Rows, arm: Arm) -> float:
    return _pooled(rows, arm, lambda score: True).value


def _pooled(rows: Rows, arm: Arm, chosen: Callable[[Score], bool]) -> Interval:
    seeds = sorted({seed for seed, _ in rows})
    return mean_interval([s for seed in seeds for s in _scores(rows, seed, arm) if chosen(s)])


def table(rows: Rows) -> list[dict[str, Any]]:
    """Every arm's accuracy over all seeds, by seed and by kind of word, and the CPU seconds of a step."""
    seeds = sorted({seed for seed, _ in rows})
    return [
        {
            "arm": asdict(arm),
            "name": arm.name,
            "accuracy": asdict(_pooled(rows, arm, lambda score: True)),
            "seeds": {str(s): mean_interval(_scores(rows, s, arm)).value for s in seeds},
            "kinds": {k: _pooled(rows, arm, lambda score, k=k: score.task == k).value for k in KINDS},
            "step_seconds": statistics.median(rows[seed, arm]["step_seconds"] for seed in seeds),
        }
        for arm in ARMS
        if arm in complete(rows)
    ]


def page(report: Mapping[str, Any]) -> str:
    """The tables in Markdown, as they stand in docs/benchmarks.md."""
    told = {
        (row["arm"]["fusion"], row["arm"]["unfrozen"], row["arm"]["aligned"]): row for row in report["arms"]
    }
    cells = ((False, False), (True, False), (False, True), (True, True))
    heads = " | ".join(
        f"{'unfrozen' if unfrozen else 'frozen'}{', aligned' if aligned else ''}"
        for unfrozen, aligned in cells
    )
    lines = [f"| | {heads} | tokens | fresh parameters | multiply-adds, 10⁶ | s a step |", "|---" * 9 + "|"]
    for name in FUSIONS:
        count = report["costs"][name]
        there = [told.get((name, *cell)) for cell in cells]
        scores = " | ".join(_percent(row) if row else "not run" for row in there)
        seconds = there[1]["step_seconds"] if there[1] else math.nan
        lines.append(
            f"| `{name}` | {scores} | {count['visual_tokens']} | {count['fresh_parameters']:,} | "
            f"{count['multiply_adds'] / 1e6:.1f} | {seconds:.3f} |"
        )
    lines += ["", "| finding | comparison | points | seeds | |", "|---|---|---|---|---|"]
    for name, found in report["findings"].items():
        for each in sorted(found["comparisons"], key=lambda c: not c["main"]):
            gap, mark = each["pooled"], ("**" if each["main"] else "")
            seeds = ", ".join(f"{100 * one['value']:+.1f}" for one in each["seeds"].values())
            points = f"{100 * gap['value']:+.1f} [{100 * gap['low']:+.1f}, {100 * gap['high']:+.1f}]"
            said = found["verdict"] if each["main"] else each["verdict"]
            lines.append(f"| {name} | {each['told']} | {points} | {seeds} | {mark}{said}{mark} |")
    return "\n".join([*lines, ""])


def _percent(row: Row) -> str:
    found, seeds = row["accuracy"], ", ".join(f"{100 * value:.0f}" for value in row["seeds"].values())
    return f"{100 * found['value']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}] ({seeds})"


def main() -> None:
    """Train what is missing, seed by seed; print the tables and write JSON and Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tuning", type=int, default=100, help="the seed on which the eyes' rate is chosen")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-fusion-claims"))
    given = parser.parse_args()
    spawn, pool = multiprocessing.get_context("spawn"), None
    if given.jobs:
        pool = ProcessPoolExecutor(given.jobs, spawn, initializer=torch.set_num_threads, initargs=(1,))
    workers, sizes = Workers(pool, given.out), Sizes()
    if not given.jobs and not workers.results.rows:
        parser.error(f"nothing was trained in {given.out} yet; leave out --jobs 0")
    rates = sweep(workers, given.tuning, sizes)
    sizes = replace(sizes, eye_rate=float(max(rates, key=lambda rate: rates[rate])))
    print(f"rates of eyes: {rates}, taken: {sizes.eye_rate:g}", flush=True)
    rows: dict[tuple[int, Arm], Row] = {}
    for seed in given.seeds:
        workers.train(seed, ARMS, sizes)
        rows |= {(seed, arm): row for arm in ARMS if (row := workers.results.find(seed, arm, sizes))}
    costs = {name: cost(Arm(name, unfrozen=True, aligned=False), sizes, given.out) for name in FUSIONS}
    report = {"arms": table(rows), "findings": findings(rows, costs), "costs": costs, "sweep": rates}
    report |= {"sizes": asdict(sizes), "seeds": given.seeds, "margin": MARGIN, "torch": torch.__version__}
    report |= {"machine": platform.machine(), "cpu_seconds": sum(row["cpu_seconds"] for row in rows.values())}
    write_json(given.out / "fusion_claims.json", report)
    write_text(given.out / "fusion_claims.md", page(report))
    print(page(report))


if __name__ == "__main__":
    main()
