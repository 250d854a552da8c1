"""MoME's two mixtures in miniature: weights from the instruction against addition, and how a router learns.

Vision: three encoders, each of which shows one label of a picture and is blind to the other two; the
instruction says which is asked for. Between encoders and reader pass two tokens of a few channels.
Language: adapters beside a frozen network learn tasks that contradict one another; the instruction says which
task it is. The arms differ in how the choice of an adapter gets a gradient.

The parts are the library's own: fusion, router, expert layer, replication.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from vlmix.core.experts import ExpertSettings
from vlmix.core.files import write_json
from vlmix.core.interfaces import VisionEncoder
from vlmix.core.sample import Score
from vlmix.core.tape import instructed, recording
from vlmix.core.tensors import FeatureMap, TextContext, VisionSpec
from vlmix.evals.statistics import mean_interval, paired_difference
from vlmix.fusion.mixture_of_vision_experts import MixtureOfVisionExperts, MixtureOfVisionExpertsSettings
from vlmix.moe.install import upcycle
from vlmix.train.transforms.replicate import copy_expert, larger

SPECS: Final = (VisionSpec((4, 4), 16), VisionSpec((2, 6), 24), VisionSpec((3, 5), 8))
LABELS, ASKED, QUESTIONS, BATCH, NOISE = 24, 16, 1500, 128, 0.8
TASKS, INNER, WIDTH = 6, 3, 16
CHANNELS: Final = (6, 12, 24, 64)
# Student's t at 97.5 % by degrees of freedom: seeds are few.
STUDENT: Final = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 7: 2.365, 9: 2.262, 14: 2.145, 19: 2.093}
LADDER: Final = ("single", "none", "straight_through", "gumbel", "switch")
RUNGS: Final = (
    ("single", "none"),
    ("none", "straight_through"),
    ("none", "switch"),
    ("straight_through", "switch"),
    ("gumbel", "switch"),
)


@dataclass(frozen=True, slots=True)
class Pictures:
    """What the encoders show of each picture, its three labels, and questions about one of them."""

    maps: tuple[Tensor, ...]
    asked: Tensor
    groups: Tensor
    answers: Tensor


class World:
    """Fixed codes of every encoder's labels, and the ways in which each group is asked for."""

    def __init__(self, seed: int) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        self.codes = [torch.randn(LABELS, s.tokens, s.channels, generator=self.draw) for s in SPECS]
        self.centres = torch.randn(len(SPECS), ASKED, generator=self.draw)

    def pictures(self, count: int) -> Pictures:
        """Pictures with labels drawn at random, a little noise, and a question of a random group."""
        labels_IE = torch.randint(LABELS, (count, len(SPECS)), generator=self.draw)
        maps = tuple(
            codes[labels_I] + NOISE * torch.randn(count, *codes.shape[1:], generator=self.draw)
            for codes, labels_I in zip(self.codes, labels_IE.T, strict=True)
        )
        groups_I = torch.randint(len(SPECS), (count,), generator=self.draw)
        asked_ID = self.centres[groups_I] + 0.3 * torch.randn(count, ASKED, generator=self.draw)
        return Pictures(maps, asked_ID, groups_I, labels_IE.gather(1, groups_I[:, None]).squeeze(1))


class Reader(nn.Module):
    """Reads the fused tokens and the instruction, and names the label."""

    def __init__(self, weights: str, align: str, channels: int, which: int | None = None) -> None:
        super().__init__()
        settings = MixtureOfVisionExpertsSettings.model_validate(
            {"grid": (1, 2), "width": channels, "instruction": ASKED, "align": align, "weights": weights}
            | {"depth": 1, "heads": 2, "points": 2}
        )
        self.which = which
        self.fusion = MixtureOfVisionExperts(settings, SPECS)
        with torch.no_grad():
            self.fusion.reset()
        self.head = nn.Sequential(nn.Linear(2 * channels + ASKED, 128), nn.GELU(), nn.Linear(128, LABELS))

    def forward(self, seen: Pictures, rows: Tensor) -> Tensor:
        """Scores of every label (I, 24); with ``which`` all other encoders show nothing."""
        maps = [x[rows] * (self.which in (None, i)) for i, x in enumerate(seen.maps)]
        encoders = [lambda _, x=x, s=s: FeatureMap(x, s.grid) for x, s in zip(maps, SPECS, strict=True)]
        asked_I1D = seen.asked[rows].unsqueeze(1)
        context = TextContext(asked_I1D, torch.ones(asked_I1D.shape[:2], dtype=torch.bool))
        fused = self.fusion(cast("list[VisionEncoder]", encoders), torch.zeros(len(rows), 3, 1, 1), context)
        return self.head(torch.cat((fused.tokens.flatten(1), seen.asked[rows]), 1))


def train(step: Callable[[], Tensor], parameters: list[nn.Parameter], steps: int, rate: float) -> None:
    """AdamW with a cosine, as long as asked."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        step().backward()
        optimizer.step()
        schedule.step()


def vision_arm(
    seed: int,
    weights: str,
    *,
    align: str = "average",
    channels: int = 12,
    which: int | None = None,
    steps: int = 1500,
) -> tuple[list[Score], dict[str, Any]]:
    """Train one reader; its scores on pictures it has not seen, and what its router weighs."""
    world = World(seed)
    test = world.pictures(QUESTIONS)
    torch.manual_seed(seed)
    reader = Reader(weights, align, channels, which)

    def step() -> Tensor:
        batch = world.pictures(BATCH)
        return F.cross_entropy(reader(batch, torch.arange(BATCH)), batch.answers)

    train(step, list(reader.parameters()), steps, 3e-3)
    every = torch.arange(QUESTIONS)
    with torch.no_grad(), recording() as tape:
        right = reader(test, every).argmax(1) == test.answers
    scores = [
        Score(f"{seed}/{i}", float(hit), "", f"group {group}", f"{seed}/{i}")
        for i, (hit, group) in enumerate(zip(right.tolist(), test.groups.tolist(), strict=True))
    ]
    return scores, weighed(tape, test.groups)


def weighed(tape: list[Any], groups_I: Tensor) -> dict[str, Any]:
    """The mean weight, and share of |g f|, of every encoder for every group of questions."""
    if not tape:
        return {}
    routing = tape[0]
    shares_IE = torch.zeros_like(routing.logits).scatter(1, routing.indices, routing.weights)
    norms_IE = torch.zeros_like(routing.logits).scatter(1, routing.indices, routing.norms)
    norms_IE = norms_IE / norms_IE.sum(1, keepdim=True)
    table = {"weight": shares_IE, "importance": norms_IE}
    means = {
        name: torch.stack([x[groups_I == g].mean(0) for g in range(len(SPECS))]) for name, x in table.items()
    }
    own = {f"own_{name}": means[name].diagonal().mean().item() for name in means}
    return own | {name: mean.tolist() for name, mean in means.items()}


class Tasks:
    """Tasks that a network of the adapter's size can do one of at a time, and how each is asked for."""

    def __init__(self, seed: int) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        self.first = torch.randn(TASKS, INNER, WIDTH, generator=self.draw) * WIDTH**-0.5
        self.second = torch.randn(TASKS, WIDTH, INNER, generator=self.draw) * INNER**-0.5
        self.centres = torch.randn(TASKS, WIDTH, generator=self.draw)

    def rows(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs (B, 1, D), instructions (B, D), and what the task adds to the frozen network (B, 1, D)."""
        x_BD = torch.randn(count, WIDTH, generator=self.draw)
        tasks_B = torch.randint(TASKS, (count,), generator=self.draw)
        asked_BD = self.centres[tasks_B] + 0.3 * torch.randn(count, WIDTH, generator=self.draw)
        inner_BM = torch.relu(torch.einsum("bmd,bd->bm", self.first[tasks_B], x_BD))
        added_BD = torch.einsum("bdm,bm->bd", self.second[tasks_B], inner_BM)
        return x_BD.unsqueeze(1), asked_BD, added_BD.unsqueeze(1)


class Frozen(nn.Module):
    """A decoder of one feed-forward network that does not train."""

    def __init__(self) -> None:
        super().__init__()
        network = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH)).requires_grad_(False)
        self.language_model = nn.ModuleDict({"mlp": network})


def ladder_arm(seed: int, arm: str, *, experts: int = 4, steps: tuple[int, int] = (300, 600)) -> float:
    """R2 on rows it has not seen, after one adapter was trained, copied and trained on."""
    tasks = Tasks(seed)
    test = tasks.rows(4096)
    torch.manual_seed(seed)
    gradient = arm if arm in {"straight_through", "gumbel", "switch"} else "straight_through"
    router = {"kind": "instance", "k": 1, "gradient": gradient}
    settings = ExpertSettings(
        kind="adapter", scope="instance", layers="all", count=1, width=INNER, router=router
    )
    config, model = PreTrainedConfig(), Frozen()
    layer = upcycle(model, settings, config, causal=True)[0]

    def error(rows: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x_B1D, asked_BD, added_B1D = rows
        dense = cast("nn.Module", layer.dense)
        with instructed(asked_BD):
            return (layer(x_B1D) - dense(x_B1D) - added_B1D).square().mean()

    def learn(count: int) -> None:
        trained = [p for p in layer.parameters() if p.requires_grad]
        train(lambda: error(tasks.rows(BATCH)), trained, count, 1e-2)

    learn(steps[0])
    if arm != "single":
        single, layer = layer, larger(layer, settings.model_copy(update={"count": experts}), config)
        copy_expert(single, layer)
        layer.router.requires_grad_(arm != "none")
    learn(steps[1])
    layer.eval()
    with torch.no_grad():
        return 1 - (error(test) / test[2].var()).item()


def vision(seeds: list[int], steps: int) -> dict[str, Any]:
    """Every vision arm: one encoder alone, addition and router over channels, and both alignments."""
    arms: dict[str, dict[str, Any]] = {f"encoder {i} alone": {"weights": "add", "which": i} for i in range(3)}
    arms |= {f"{w}, {c} channels": {"weights": w, "channels": c} for c in CHANNELS for w in ("add", "router")}
    deformable = {"align": "adaptive_deformable"}
    arms |= {f"{w}, deformable": {"weights": w, **deformable} for w in ("add", "router")}
    report: dict[str, Any] = {}
    scores: dict[str, list[Score]] = {}
    for name, options in arms.items():
        start = time.process_time()
        found = [vision_arm(seed, steps=steps, **options) for seed in seeds]
        scores[name] = [score for part, _ in found for score in part]
        report[name] = {
            "accuracy": asdict(mean_interval(scores[name])),
            "seeds": [mean_interval(part).value for part, _ in found],
            "router": [weights for _, weights in found],
            "seconds": time.process_time() - start,
        }
        own = [weights["own_weight"] for _, weights in found if weights]
        print(
            f"{name:24} {_interval(report[name]['accuracy'])}  own weight {own and f'{min(own):.3f}'}",
            flush=True,
        )
    for name in [*(f"{c} channels" for c in CHANNELS), "deformable"]:
        gap = paired_difference(scores[f"router, {name}"], scores[f"add, {name}"])
        report[f"router, {name}"]["ahead_of_addition"] = asdict(gap)
        print(
            f"router ahead of addition, {name:12} {100 * gap.value:5.1f} points "
            f"[{100 * gap.low:.1f}, {100 * gap.high:.1f}]"
        )
    return report


def ladder(seeds: list[int]) -> dict[str, Any]:
    """Every arm of the ladder, with as many adapters as tasks and with fewer, and each step up it."""
    report: dict[str, Any] = {}
    for experts in (4, TASKS):
        found = {arm: [ladder_arm(seed, arm, experts=experts) for seed in seeds] for arm in LADDER}
        rows = {arm: _over_seeds(values) for arm, values in found.items()}
        for below, above in RUNGS:
            gaps = [a - b for a, b in zip(found[above], found[below], strict=True)]
            rows[f"{above} over {below}"] = _over_seeds(gaps)
        for name, row in rows.items():
            print(f"{experts} adapters  {name:30} {row['value']:6.3f}  [{row['low']:.3f}, {row['high']:.3f}]")
        report[f"{experts} adapters"] = rows
    return report


def main() -> None:
    """Run every arm and seed; print tables and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=["vision", "ladder"], default=["vision", "ladder"])
    parser.add_argument("--seeds", type=int, default=3, help="of the vision arms")
    parser.add_argument("--ladder-seeds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1500, help="of the vision arms")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report: dict[str, Any] = {}
    if "vision" in options.parts:
        report["vision"] = vision(list(range(options.seeds)), options.steps)
    if "ladder" in options.parts:
        report["ladder"] = ladder(list(range(options.ladder_seeds)))
    report["setting"] = {
        "steps": options.steps,
        "threads": options.threads,
        "noise": NOISE,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.out, report)


def _interval(found: dict[str, float]) -> str:
    return f"{found['value']:6.1%} [{found['low']:.1%}, {found['high']:.1%}]"


def _over_seeds(values: list[float]) -> dict[str, Any]:
    """The mean over seeds with its 95 % interval."""
    half = statistics.stdev(values) * len(values) ** -0.5 * STUDENT[len(values) - 1]
    middle = statistics.mean(values)
    return {"value": middle, "low": middle - half, "high": middle + half, "seeds": values}


if __name__ == "__main__":
    main()
