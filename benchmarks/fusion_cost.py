"""What each fusion costs from the encoders' maps to the language model's tokens, at equal settings.

The maps are random, of the sizes that CLIP-L at 336 pixels (24 x 24 x 1024) and ConvNeXt-L at 768 pixels
give: all four stages for the fusions that read several scales, the last (24 x 24 x 1536) for the others.
Every fusion is followed by a two-layer MLP to width 4096. Encoders are frozen, as published: training is the
forward pass and the gradients of fusion and projector. Times are taken in turns; ratios are to
``channel_concat`` in the same turn. Peak memory is that of a process that runs one step, beyond what lay
there before.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vlmix.core.interfaces import Fusion, VisionEncoder
from vlmix.core.parts import ENCODERS, FUSIONS, read_part
from vlmix.core.tensors import FeatureMap, TextContext, VisionSpec
from vlmix.projectors.mlp import MlpProjector, MlpSettings

WIDTH, PEER = 4096, "channel_concat"
ALONE, LAST, ALL, HALVED = "CLIP alone", "last stage", "all stages", "all stages on the second's grid"
# Kind, what it reads besides CLIP, settings other than its own defaults, and why they differ.
CASES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "single": ("single", ALONE, {}, ""),
    "channel_concat": ("channel_concat", LAST, {}, "as Eagle does"),
    "channel_concat, all": ("channel_concat", ALL, {}, "what patch_mining reads: stacked, then reduced"),
    "sequence_append": ("sequence_append", LAST, {"width": 1024}, "a Linear to 1024 channels for each"),
    "patch_mining": ("patch_mining", ALL, {}, "as published; the stack is not made"),
    "patch_mining, stacked": ("patch_mining", ALL, {"native": False}, "the same result through the stack"),
    "deformable": ("deformable", ALL, {}, "each stage a level"),
    "mixture_of_resolution": ("mixture_of_resolution", LAST, {}, "adapters between blocks that do nothing"),
    "spatial_aggregator": ("spatial_aggregator", LAST, {}, "one cell of each map for a query"),
    "spatial_aggregator, all": (
        "spatial_aggregator",
        HALVED,
        {},
        "4 x 4 cells a query, as Cambrian's ConvNeXt",
    ),
    "mixture_of_vision_experts": (
        "mixture_of_vision_experts",
        LAST,
        {"weights": "add", "width": 1024, "grid": (24, 24)},
        "six deformable layers for each map",
    ),
    "mixture_of_vision_experts, average": (
        "mixture_of_vision_experts",
        LAST,
        {"weights": "add", "width": 1024, "grid": (24, 24), "align": "average"},
        "a Linear for each map",
    ),
    "mixture_of_vision_experts, router": (
        "mixture_of_vision_experts",
        LAST,
        {"width": 1024, "grid": (24, 24), "instruction": WIDTH, "router": {"kind": "instance", "width": 512}},
        "the same, weighed by an instruction as wide as the decoder",
    ),
    "attention_pool": ("attention_pool", ALONE, {}, "a quarter of the tokens"),
}


def sizes(side: int) -> tuple[VisionSpec, dict[str, VisionSpec]]:
    """CLIP's map, and what is read of a ConvNeXt-L that sees ``side`` pixels."""
    cells = side // 32
    low = VisionSpec((cells, cells), 1024, blocks=24, token_blocks=True)
    stages = tuple(VisionSpec((cells * 8 >> i, cells * 8 >> i), 192 << i) for i in range(4))
    channels = sum(stage.channels for stage in stages)
    return low, {
        LAST: stages[-1],
        ALL: VisionSpec(stages[0].grid, channels, levels=stages),
        HALVED: VisionSpec(stages[1].grid, channels, levels=stages),
    }


class Still:
    """Stands for a frozen encoder: its maps are there."""

    def __init__(self, spec: VisionSpec, device: torch.device, dtype: torch.dtype) -> None:
        self.spec = spec
        levels = spec.levels or (spec,)
        self.maps = [
            FeatureMap(torch.randn(1, s.tokens, s.channels, device=device, dtype=dtype), s.grid)
            for s in levels
        ]

    def __call__(self, pixel_values: Tensor) -> FeatureMap:
        """The map, its levels stacked where there are several."""
        stacked = torch.cat([level.resampled(self.spec.grid).tokens for level in self.maps], dim=-1)
        return self.maps[0] if len(self.maps) == 1 else FeatureMap(stacked, self.spec.grid)

    def levels(self, pixel_values: Tensor) -> list[FeatureMap]:
        """Every level on its own grid."""
        return self.maps

    def embed(self, pixel_values: Tensor) -> Tensor:
        """The tokens before the first block."""
        return self.maps[0].tokens

    def block(self, index: int, x: Tensor) -> Tensor:
        """Nothing: blocks are not what is timed."""
        return x

    def finish(self, x: Tensor) -> FeatureMap:
        """The tokens behind the last block."""
        return FeatureMap(x, self.spec.grid)


class Way(nn.Module):
    """One fusion and its projector on maps that are there."""

    def __init__(self, name: str, side: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        kind, reads, changes, _ = CASES[name]
        low, others = sizes(side)
        specs = [low] if reads == ALONE else [low, others[reads]]
        settings = read_part(FUSIONS, {"kind": kind, **changes})
        torch.manual_seed(0)
        self.fusion: Fusion = FUSIONS.get(kind)(settings, specs)
        fused = FUSIONS.get(kind).plan(settings, specs)
        self.projector = MlpProjector(MlpSettings(), fused, WIDTH)
        with torch.no_grad():
            self.fusion.reset()
        self.to(device, dtype)
        self.encoders = [Still(spec, device, dtype) for spec in specs]
        width = FUSIONS.get(kind).instruction_width(settings)
        self.asked = None if width is None else _instruction(width, device, dtype)
        self.pixels = torch.zeros(1, 3, 8, 8, device=device)

    def forward(self) -> Tensor:
        """Tokens for the language model (1, N, 4096)."""
        encoders = cast("list[VisionEncoder]", self.encoders)
        return self.projector(self.fusion(encoders, self.pixels, self.asked)).tokens


def forward(way: Way) -> Tensor:
    """Without gradients."""
    with torch.no_grad():
        return way()


def training(way: Way) -> Tensor:
    """Forward and backward; the encoders get no gradient."""
    way.zero_grad(set_to_none=True)
    loss = way().float().square().mean()
    loss.backward()
    return loss


STEPS = {"forward": forward, "training": training}


def times(ways: dict[str, Way], repeats: int, device: torch.device) -> dict[str, dict[str, list[float]]]:
    """Seconds of every step of every fusion, in turns, the first turn discarded."""
    found: dict[str, dict[str, list[float]]] = {name: {what: [] for what in STEPS} for name in ways}
    for turn in range(repeats + 1):
        for what, step in STEPS.items():
            for name in list(ways) if turn % 2 else list(ways)[::-1]:
                run = partial(step, ways[name])
                _wait(device)
                start = time.perf_counter()
                run()
                _wait(device)
                if turn:
                    found[name][what].append(time.perf_counter() - start)
    return found


def peak_bytes(name: str, what: str, options: argparse.Namespace) -> int:
    """Peak memory of one step in a process of its own, beyond weights and maps."""
    command = [sys.executable, __file__, "--only", name, what, "--device", options.device]
    command += ["--threads", str(options.threads), "--side", str(options.side)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def only(name: str, what: str, side: int, device: torch.device) -> int:
    """Run one step and say how much memory it took: allocated on an accelerator, resident on the CPU."""
    way = Way(name, side, device, _dtype(device.type))
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
        STEPS[what](way)
        return torch.accelerator.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS:")
    STEPS[what](way)
    return _status("VmHWM:") - before


def multiply_adds(name: str, side: int) -> int:
    """Multiply-adds of all matrix products of one forward pass, counted on shapes."""
    with FlopCounterMode(display=False) as counter:
        forward(Way(name, side, torch.device("meta"), torch.float32))
    return counter.get_total_flops() // 2


def encoders_multiply_adds() -> dict[str, int]:
    """For scale: those of the encoders at 336 and 768 pixels, which run before any fusion."""
    found = {}
    for kind in ("clip", "convnext"):
        with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
            ENCODERS.get(kind)(ENCODERS.get(kind).settings_class())(torch.empty(1, 3, 64, 64))
        found[kind] = counter.get_total_flops() // 2
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every fusion that is registered, on one machine."""
    device = torch.device(options.device)
    absent = sorted(set(FUSIONS.names()) - {kind for kind, *_ in CASES.values()})
    if absent:
        raise SystemExit(f"no sizes are given for {', '.join(absent)}: add them to CASES")
    ways = {name: Way(name, options.side, device, _dtype(options.device)) for name in CASES}
    seconds = times(ways, options.repeats, device)
    report: dict[str, Any] = {}
    for name, way in ways.items():
        row: dict[str, Any] = {
            "tokens": forward(way).shape[1],
            "fusion_parameters": sum(p.numel() for p in way.fusion.parameters()),
            "parameters": sum(p.numel() for p in way.parameters()),
            "multiply_adds": multiply_adds(name, options.side),
            "reads": CASES[name][1],
            "note": CASES[name][3],
        }
        for what in STEPS:
            pairs = zip(seconds[name][what], seconds[PEER][what], strict=True)
            row[f"{what}_seconds"] = statistics.median(seconds[name][what])
            row[f"{what}_ratio"] = statistics.median(a / b for a, b in pairs)
        report[name] = row
    mined = [forward(ways[name]) for name in ("patch_mining", "patch_mining, stacked")]
    report["patch_mining"]["largest_difference_to_stacked"] = (mined[0] - mined[1]).abs().max().item()
    del ways
    for name in CASES:
        for what in STEPS:
            report[name][f"{what}_peak_bytes"] = peak_bytes(name, what, options)
    return report


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    head = f"{'':24}{'tokens':>7}{'fusion, M':>10}{'all, M':>8}{'10^9 MAC':>10}{'forward, s':>11}{'ratio':>7}"
    lines = [head + f"{'MiB':>7}{'training, s':>12}{'ratio':>7}{'MiB':>7}  reads; note"]
    for name, row in report.items():
        line = f"{name:24}{row['tokens']:7d}{row['fusion_parameters'] / 1e6:10.2f}"
        line += f"{row['parameters'] / 1e6:8.1f}{row['multiply_adds'] / 1e9:10.1f}"
        for what, width in (("forward", 11), ("training", 12)):
            line += f"{row[f'{what}_seconds']:{width}.4f}{row[f'{what}_ratio']:7.2f}"
            line += f"{row[f'{what}_peak_bytes'] / 2**20:7.0f}"
        lines.append(f"{line}  {row['reads']}{'; ' * bool(row['note'])}{row['note']}")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default=_best_device(), help="an accelerator unless there is none")
    parser.add_argument("--side", type=int, default=768, help="pixels a side of what ConvNeXt sees")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.only:
        print(only(*options.only, options.side, torch.device(options.device)))
        return
    load = os.getloadavg()[0]
    report = measure(options)
    print(table(report))
    if options.out:
        setting = {
            "side": options.side,
            "device": options.device,
            "load_before": load,
            "encoders_multiply_adds": encoders_multiply_adds(),
            "threads": torch.get_num_threads(),
            "repeats": options.repeats,
            "torch": torch.__version__,
            "machine": platform.machine(),
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"fusions": report, "setting": setting}, indent=2)
        options.out.write_text(text + "\n", encoding="utf-8")


def _instruction(width: int, device: torch.device, dtype: torch.dtype) -> TextContext:
    """What was asked, for one picture."""
    told_11D = torch.randn(1, 1, width, device=device, dtype=dtype)
    return TextContext(told_11D, torch.ones(1, 1, dtype=torch.bool, device=device))


def _status(key: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition(key)[2].split()[0]) * 1024


def _dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def _best_device() -> str:
    device = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if device is None else device.type


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


if __name__ == "__main__":
    main()
