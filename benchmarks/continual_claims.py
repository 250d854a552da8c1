"""What a language model forgets when it learns to see, by method: the miniature of arXiv:2410.19925.

For each seed a small language model learns made-up facts by heart (task 1) and a projector is aligned to it
with everything else frozen. Then language model and projector learn questions about pictures whose answers
are the words of the facts: one_shot, four types of question at once; sequence, one type after the other.
Eyes are frozen and random throughout. Learning rates are chosen on seeds of their own by two rules: `matched`
gives every method the rate at which plain fine-tuning learns nearest to 80 points; `own` gives each method
that with the largest VL - forgetting (harmonic means). Methods that keep rows of earlier tasks have none in
one_shot, where they are the same as their other half; they are run in the sequence only.

The parts are the library's own: data order, methods, optimizer, schedule, responder, cloze, metrics. A run
whose result stands in `--out` already is not repeated.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from continual_world import (
    AIM,
    ASKED,
    FACTS,
    KINDS,
    METHODS,
    PAST_ONLY,
    RATES,
    ROWS,
    TASKS,
    Cells,
    CellsSettings,
    Setting,
    Sizes,
    over_seeds,
    recipe,
)
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from vlmix.core.files import write_bytes, write_json, write_text
from vlmix.core.interfaces import Source
from vlmix.core.parts import read_part
from vlmix.core.sample import Decoding, Sample
from vlmix.data.sources.facts import Facts, FactsSettings
from vlmix.evals.benchmarks.cloze import Cloze, ClozeSettings
from vlmix.evals.benchmarks.synth_qa import normalised
from vlmix.evals.forgetting import ForgettingMatrix, heatmap
from vlmix.evals.responder import ModelResponder
from vlmix.models.batching import Encoded, Opened
from vlmix.train.build import Setup, build, stage_processor
from vlmix.train.continual import CONTINUAL
from vlmix.train.continual._base import Memory, Method, Past
from vlmix.train.optim import build_optimizer, rate_factor, set_rates
from vlmix.train.order import DataOrder, RowId
from vlmix.train.recipe import Stage
from vlmix.train.trainable import select, set_modes


class Miniature:
    """One seed's model; what was encoded once is kept for every run."""

    def __init__(self, seed: int, sizes: Sizes) -> None:
        self.seed, self.sizes, self.recipe = seed, sizes, recipe(seed, sizes)
        self.setup: Setup = build(self.recipe)
        self.model, self.processor = self.setup.model, self.setup.processor
        self._encoded: dict[str, tuple[Encoded, Opened]] = {}
        self.cloze = Cloze(ClozeSettings(facts=FACTS, seed=seed))
        self.asked = [self._cells((kind,), 3000 + place, ASKED // 4) for place, kind in enumerate(KINDS)]
        language, align, self.stage = self.recipe.stages
        naive = CONTINUAL.get("naive")(read_part(CONTINUAL, {"kind": "naive"}))
        self.learn(language, [Facts(FactsSettings(size=FACTS, seed=seed))], naive, 0)
        self.learn(align, [self._cells(("caption",), 1000, ROWS)], naive, 1)
        self.base = copy.deepcopy(self.model.state_dict())
        self.before = self.points()

    def _cells(self, tasks: tuple[str, ...], seed: int, size: int) -> Cells:
        return Cells(CellsSettings(tasks=tasks, seed=self.seed + seed, size=size, noise=self.sizes.noise))

    def run(self, setting: Setting, kind: str, rate: float) -> dict[str, Any]:
        """Learn every task of ``setting`` with one method; the matrix of points, and seconds."""
        started = time.process_time()
        self.model.load_state_dict(self.base)
        torch.manual_seed(self.seed)
        method = CONTINUAL.get(kind)(read_part(CONTINUAL, {"kind": kind, **METHODS[kind]}))
        steps = self.sizes.one_shot if setting == "one_shot" else self.sizes.task
        rows, past = [self.before], list[Past]()
        for place, tasks in enumerate(TASKS[setting]):
            train = {"projector.*": rate, "language_model.*": rate}
            stage = self.stage.model_copy(update={"train": train, "steps": steps})
            sources: list[Source] = [self._cells(tasks, 2000 + place, ROWS)]
            memories = method.extra(past, self.seed)
            drawn = self.learn(stage, sources, method, 2 + place, memories)
            past.append(Past("+".join(tasks), sources, lambda drawn=drawn: iter(drawn)))
            rows.append(self.points())
        found = {"setting": setting, "method": kind, "rate": rate, "seed": self.seed, "points": rows}
        return found | {"seconds": round(time.process_time() - started, 2)}

    def learn(
        self,
        stage: Stage,
        sources: Sequence[Source],
        method: Method,
        index: int,
        memories: Sequence[Memory] = (),
    ) -> list[RowId]:
        """Train one stage, and return the rows it drew from its own sources."""
        model, processor = self.model, stage_processor(self.processor, stage)
        method.reshape(model)
        selection = select(model, method.train(stage.train, model))
        optimizer = build_optimizer(selection, stage.optimizer, model)
        everything = [*sources, *(memory.source for memory in memories)]
        order = ordered(stage, sources, memories, (self.seed, index))
        method.begin(model)
        set_modes(model)
        drawn: list[RowId] = []
        for step in range(order.steps):
            rows = order.rows_for_step(step)
            drawn += [row for row in rows if row.source < len(sources)]
            batch = self._batch([everything[row.source][row.row] for row in rows], processor)
            items = int((batch["labels"][:, 1:] != -100).sum())
            output = model(**batch, logits_to_keep="supervised", num_items_in_batch=items, use_cache=False)
            optimizer.zero_grad(set_to_none=True)
            method.loss(model, batch, output, items).backward()
            clip_grad_norm_([p for p in selection.parameters.values() if p.grad is not None], 1.0)
            set_rates(optimizer, rate_factor(stage.schedule, step, order.steps))
            optimizer.step()
        method.end(model, self._singles(sources, drawn, processor))
        return drawn

    def points(self) -> dict[str, float]:
        """Points on every kind of fact and every type of question."""
        responder, decoding = ModelResponder(self.model, self.processor), Decoding(6, batch_size=256)
        passages = self.cloze.samples()
        said = self.cloze.ask(responder, passages, decoding)
        right: dict[str, list[float]] = {}
        for sample, answer in zip(passages, said, strict=True):
            right.setdefault(f"fact {sample.task}", []).append(self.cloze.score(sample, answer).value)
        questions = [sample for source in self.asked for sample in source]
        for sample, answer in zip(questions, responder.respond(questions, decoding), strict=True):
            right.setdefault(sample.task, []).append(float(normalised(answer.text) == sample.target))
        return {name: 100 * statistics.mean(values) for name, values in right.items()}

    def _batch(self, samples: Iterable[Sample], processor: Any) -> dict[str, Tensor]:
        pairs = [self._encode(sample, processor) for sample in samples]
        return dict(processor.collate([pair[0] for pair in pairs], opened=[pair[1] for pair in pairs]))

    def _encode(self, sample: Sample, processor: Any) -> tuple[Encoded, Opened]:
        if sample.id not in self._encoded:
            encoded = processor.encode(sample, supervise=True)
            self._encoded[sample.id] = encoded, processor.open_images(encoded)
        return self._encoded[sample.id]

    def _singles(self, sources: Sequence[Source], drawn: Sequence[RowId], processor: Any) -> Iterator[Any]:
        return (self._batch([sources[row.source][row.row]], processor) for row in drawn)


def ordered(
    stage: Stage, sources: Sequence[Source], memories: Sequence[Memory], seed: tuple[int, int]
) -> DataOrder:
    """The order of a stage with its memories: a share of all draws, or each row as often as its own."""
    sizes = [len(source) for source in [*sources, *(memory.source for memory in memories)]]
    shares = [memory.share for memory in memories]
    weights: list[float | None] = [None] * len(sizes)
    if any(share is not None for share in shares):
        own = 1 - sum(share or 0.0 for share in shares)
        weights = [own * size / sum(sizes[: len(sources)]) for size in sizes[: len(sources)]] + shares
    return DataOrder.plan(sizes, weights, stage.batch_size, seed, steps=stage.steps, epochs=None)


def matrix_of(run: Mapping[str, Any]) -> ForgettingMatrix:
    """The forgetting matrix of one run."""
    tasks = {"language": tuple(f"fact {kind}" for kind in KINDS)}
    tasks |= {"+".join(task): task for task in TASKS[run["setting"]]}
    return ForgettingMatrix(tasks, tuple(run["points"]))


def figures(run: Mapping[str, Any]) -> dict[str, float]:
    """Of the finished run: language and VL points, forgetting, each by both means, and what rates go by.

    ``at_once`` is how well tasks were known right after they were learnt.
    """
    matrix = matrix_of(run)
    last, kinds = len(matrix.tasks), ("harmonic", "arithmetic")
    found = {f"vl_{kind}": matrix.learnt(last, kind) for kind in kinds}
    found |= {f"nl_{kind}": matrix.omega("language", last, kind) for kind in kinds}
    found |= {f"delta_{kind}": matrix.delta("language", last, kind) for kind in kinds}
    at_once = [matrix.omega(task, k, "arithmetic") for k, task in enumerate(matrix.tasks[1:], start=2)]
    found["at_once"] = statistics.mean(at_once)
    return found | {"score": found["vl_harmonic"] - found["delta_harmonic"]}


class Results:
    """One JSON line a run; those that are there are not repeated."""

    def __init__(self, path: Path, sizes: Sizes) -> None:
        self.path, self.sizes, self.minis = path, sizes, dict[int, Miniature]()
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.rows = {self._key(row): row for row in map(json.loads, lines)}

    def run(self, setting: str, method: str, rate: float, seed: int) -> dict[str, Any]:
        """The result of one run, from the file or made now."""
        key = (setting, method, rate, seed)
        if key not in self.rows:
            if seed not in self.minis:
                self.minis[seed] = Miniature(seed, self.sizes)
            row = self.minis[seed].run(setting, method, rate)  # pyright: ignore[reportArgumentType]
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            self.rows[key] = row
            told = figures(row)
            points = "  ".join(f"{key} {told[f'{key}_harmonic']:5.1f}" for key in ("vl", "nl", "delta"))
            print(f"{setting:9} {method:15} {rate:g} seed {seed:<4} {points}  {row['seconds']} s", flush=True)
        return self.rows[key]

    @staticmethod
    def _key(row: Mapping[str, Any]) -> tuple[str, str, float, int]:
        return row["setting"], row["method"], row["rate"], row["seed"]


def sweep(results: Results, setting: str, method: str, seeds: Sequence[int]) -> list[dict[str, float]]:
    """Every rate's figures, averaged over the tuning seeds."""
    table = []
    for rate in RATES:
        found = [figures(results.run(setting, method, rate, seed)) for seed in seeds]
        table.append({"rate": rate} | {key: statistics.mean(f[key] for f in found) for key in found[0]})
    return table


def claims(table: Mapping[str, Mapping[str, Any]], setting: str) -> list[dict[str, Any]]:
    """The paper's orderings that this setting has, each with the paired difference that decides it."""
    asked: list[tuple[str, str, str, str]] = []
    if setting == "one_shot":
        better = ("lora", "soft_targets", "msgm")
        asked += [(f"{m} forgets less than naive", "delta_harmonic", "naive", m) for m in better]
        asked += [
            ("soft_targets learns more than naive", "vl_harmonic", "soft_targets", "naive"),
            ("naive learns more than lora", "vl_harmonic", "naive", "lora"),
            ("naive learns more than msgm", "vl_harmonic", "naive", "msgm"),
            ("lora forgets less than soft_targets", "delta_harmonic", "soft_targets", "lora"),
        ]
    else:
        better = ("lora", "msgm", "rehearsal", "msgm_rehearsal")
        asked += [(f"{m} forgets less language than naive", "delta_harmonic", "naive", m) for m in better]
        asked += [
            ("naive forgets less language than soft_targets", "delta_harmonic", "soft_targets", "naive"),
            ("msgm_rehearsal knows more VL at the end than naive", "vl_harmonic", "msgm_rehearsal", "naive"),
            ("msgm_rehearsal knows more VL at the end than msgm", "vl_harmonic", "msgm_rehearsal", "msgm"),
            ("rehearsal knows more VL at the end than naive", "vl_harmonic", "rehearsal", "naive"),
            ("lora knows more VL at the end than naive", "vl_harmonic", "lora", "naive"),
        ]
    return [judged(table, *each) for each in asked if {*each[2:]} <= {*table}]


def judged(
    table: Mapping[str, Mapping[str, Any]], claim: str, figure: str, more: str, less: str
) -> dict[str, Any]:
    """Whether ``more`` has more of the figure than ``less``: it has where the interval is above 0."""
    gaps = [a - b for a, b in zip(table[more][figure]["seeds"], table[less][figure]["seeds"], strict=True)]
    gap = over_seeds(gaps)
    state = "reproduced" if gap["low"] > 0 else "reversed" if gap["high"] < 0 else "undecided"
    return {"claim": claim, "figure": figure, "gap": gap, "verdict": state}


def setting_report(
    results: Results, setting: str, methods: Sequence[str], tuning: Sequence[int], seeds: Sequence[int]
) -> dict[str, Any]:
    """Choose rates on the tuning seeds, then run on the others; figures and claims under both rules."""
    sweeps = {method: sweep(results, setting, method, tuning) for method in methods}
    matched = min(sweeps["naive"], key=lambda row: abs(row["at_once"] - AIM))["rate"]
    own = {method: max(rows, key=lambda row: row["score"])["rate"] for method, rows in sweeps.items()}
    report: dict[str, Any] = {"sweep": sweeps, "seeds": list(seeds)}
    for rule, rates in {"matched": dict.fromkeys(methods, matched), "own": own}.items():
        table = {m: method_report([results.run(setting, m, rates[m], s) for s in seeds]) for m in methods}
        report[rule] = {"table": table, "claims": claims(table, setting)}
    return report


def method_report(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One method at one rate: every figure over seeds, and the mean matrix."""
    told = [figures(run) for run in runs]
    row: dict[str, Any] = {
        key: over_seeds([f[key] for f in told]) | {"seeds": [f[key] for f in told]} for key in told[0]
    }
    return row | {"rate": runs[0]["rate"], "matrix": mean_matrix(runs).to_json()}


def mean_matrix(runs: Sequence[Mapping[str, Any]]) -> ForgettingMatrix:
    """The matrix of points averaged over seeds."""
    matrices = [matrix_of(run) for run in runs]
    rows = zip(*(matrix.points for matrix in matrices), strict=True)
    points = tuple({name: statistics.mean(row[name] for row in same) for name in same[0]} for same in rows)
    return ForgettingMatrix(matrices[0].benchmarks, points)


def show(setting: str, report: Mapping[str, Any]) -> None:
    """The tables, the sweep and the verdicts, on the screen."""
    for method, rows in report["sweep"].items():
        told = "   ".join(f"{r['rate']:g}: {r['vl_harmonic']:.1f} / {r['delta_harmonic']:.1f}" for r in rows)
        print(f"{setting} sweep {method:15} VL / forgot  {told}")
    for rule in ("matched", "own"):
        print(f"\n{setting}, {rule} rates; mean over seeds {report['seeds']} [95 %]; (arithmetic means)")
        for method, row in report[rule]["table"].items():
            cells = "   ".join(
                f"{what} {_cell(row, key)}" for what, key in (("VL", "vl"), ("forgot", "delta"))
            )
            print(f"  {method:15} rate {row['rate']:<6g} {cells}   at once {row['at_once']['value']:.1f}")
        for claim in report[rule]["claims"]:
            gap = claim["gap"]
            ends = f"{gap['value']:+.1f} [{gap['low']:+.1f}, {gap['high']:+.1f}]"
            print(f"  {claim['verdict']:10} {claim['claim']}: {ends}")


def _cell(row: Mapping[str, Any], key: str) -> str:
    found = row[f"{key}_harmonic"]
    middle = row[f"{key}_arithmetic"]["value"]
    return f"{found['value']:5.1f} [{found['low']:.1f}, {found['high']:.1f}] ({middle:.1f})"


def page(report: Mapping[str, Any]) -> str:
    """The same tables in Markdown, as they stand in docs/benchmarks.md."""
    lines: list[str] = []
    for setting in (name for name in TASKS if name in report):
        for rule in ("matched", "own"):
            title = "one rate for all" if rule == "matched" else "each method at its own rate"
            lines += [f"**{setting.replace('_', ' ')}, {title}**", ""]
            lines += [
                "| method | rate | VL at the end | forgotten | right after each task |",
                "|---|---|---|---|---|",
            ]
            for method, row in report[setting][rule]["table"].items():
                cells = f"{_cell(row, 'vl')} | {_cell(row, 'delta')} | {row['at_once']['value']:.1f}"
                lines.append(f"| `{method}` | {row['rate']:g} | {cells} |")
            lines += ["", "| the paper's ordering | difference, points | |", "|---|---|---|"]
            for claim in report[setting][rule]["claims"]:
                gap = claim["gap"]
                ends = f"{gap['value']:+.1f} [{gap['low']:+.1f}, {gap['high']:+.1f}]"
                lines.append(f"| {claim['claim']} | {ends} | {claim['verdict']} |")
            lines.append("")
        lines += ["| sweep: VL / forgotten | " + " | ".join(f"{rate:g}" for rate in RATES) + " |"]
        lines += ["|---" * (1 + len(RATES)) + "|"]
        for method, rows in report[setting]["sweep"].items():
            told = " | ".join(f"{row['vl_harmonic']:.1f} / {row['delta_harmonic']:.1f}" for row in rows)
            lines.append(f"| `{method}` | {told} |")
        lines.append("")
    return "\n".join(lines)


def draw(results: Results, setting: str, report: Mapping[str, Any], out: Path) -> None:
    """Each method's matrix at the matched rate, as a picture."""
    for method, row in report["matched"]["table"].items():
        runs = [results.run(setting, method, row["rate"], seed) for seed in report["seeds"]]
        write_bytes(out / f"{setting}-{method}.png", heatmap(mean_matrix(runs)))


def main() -> None:
    """Run what is missing; print tables and write JSON and the matrices' pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--tuning", type=int, nargs="+", default=[100, 101])
    parser.add_argument("--settings", nargs="+", choices=[*TASKS], default=[*TASKS])
    parser.add_argument("--methods", nargs="+", choices=[*METHODS], default=[*METHODS])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-continual"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    sizes = Sizes()
    results = Results(given.out / "runs.jsonl", sizes)
    report: dict[str, Any] = {}
    for setting in given.settings:
        methods = [m for m in given.methods if setting == "sequence" or m not in PAST_ONLY]
        report[setting] = setting_report(results, setting, methods, given.tuning, given.seeds)
        show(setting, report[setting])
        draw(results, setting, report[setting], given.out)
    report["sizes"] = asdict(sizes)
    report["settings"] = {"methods": dict(METHODS), "rates": RATES, "tuning": given.tuning, "aim": AIM}
    report["machine"] = {"torch": torch.__version__, "machine": platform.machine(), "threads": given.threads}
    report["cpu_seconds"] = sum(row["seconds"] for row in results.rows.values())
    write_json(given.out / "continual_claims.json", report)
    write_text(given.out / "continual_claims.md", page(report))


if __name__ == "__main__":
    main()
