"""Times patch mining as published against the absorbed form vlmix runs, in one process on the same tensors.

Prints a table and, with ``--out``, writes it as JSON. The default size is Mini-Gemini's: 24 x 24 queries of
1024 channels, a map of 192 x 192 positions and 2880 channels, float32.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vlmix.core.tensors import FeatureMap, VisionSpec
from vlmix.fusion.patch_mining import PatchMining, PatchMiningSettings

FULL = (VisionSpec((24, 24), 1024), VisionSpec((192, 192), 2880))
SMALL = (VisionSpec((8, 8), 256), VisionSpec((64, 64), 720))


def literal(part: PatchMining, low: FeatureMap, high: FeatureMap) -> Tensor:
    """The published formula, one step per line: every key and value is made."""
    (rows, columns), (window_rows, window_columns) = low.grid, part.window
    map_IGPWQC = high.tokens.unflatten(1, (rows, window_rows, columns, window_columns))
    windows_INMC = map_IGPWQC.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    query_IN1D = part.query(low.tokens).unsqueeze(2)
    key_INMD, value_INMD = part.key(windows_INMC), part.value(windows_INMC)
    weights_IN1M = (query_IN1D @ key_INMD.mT / query_IN1D.shape[-1] ** 0.5).softmax(-1)
    return low.tokens + (weights_IN1M @ value_INMD).squeeze(2)


def absorbed(part: PatchMining, low: FeatureMap, high: FeatureMap) -> Tensor:
    """What vlmix runs."""
    return part.merge([low, high]).tokens


Form = Callable[[PatchMining, FeatureMap, FeatureMap], Tensor]


def gradients(form: Form, part: PatchMining, maps: list[FeatureMap]) -> list[Tensor]:
    """Run forward and backward, and return the gradients of both maps and of every live parameter."""
    leaves = [m.tokens.detach().requires_grad_() for m in maps]
    parameters = [p for name, p in part.named_parameters() if name not in part.inert_parameters]
    out = form(part, *(FeatureMap(leaf, m.grid) for leaf, m in zip(leaves, maps, strict=True)))
    return list(torch.autograd.grad(out.square().mean(), [*leaves, *parameters]))


def timed(run: Callable[[], Any], repeats: int, device: torch.device) -> tuple[float, float]:
    """Median wall time and CPU time, in seconds, of ``repeats`` runs after one that warms up.

    CPU time says more than wall time where other programs share the cores.
    """
    walls, cpus = [], []
    for index in range(repeats + 1):
        _wait(device)
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        _wait(device)
        if index:
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
    return statistics.median(walls), statistics.median(cpus)


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """Memory of the accelerator beyond what lies there before; unknown on the CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def multiply_adds(run: Callable[[], Any]) -> int:
    """Multiply-adds of all matrix products in ``run``."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops() // 2


def measure(specs: tuple[VisionSpec, VisionSpec], device: torch.device, repeats: int) -> dict[str, Any]:
    """Both forms on the same random tensors and weights."""
    torch.manual_seed(0)
    part = PatchMining(PatchMiningSettings(), specs).to(device)
    maps = [FeatureMap(torch.randn(1, s.tokens, s.channels, device=device), s.grid) for s in specs]
    forms: dict[str, Form] = {"literal": literal, "absorbed": absorbed}
    report: dict[str, Any] = {}
    for name, form in forms.items():
        with torch.no_grad():
            forward = timed(lambda form=form: form(part, *maps), repeats, device)
        both = timed(lambda form=form: gradients(form, part, maps), repeats, device)
        work = multiply_adds(lambda form=form: form(part, *maps))
        report[name] = {
            "forward_seconds": forward[0],
            "forward_cpu_seconds": forward[1],
            "forward_backward_seconds": both[0],
            "forward_backward_cpu_seconds": both[1],
            "multiply_adds": work,
            "multiply_adds_keys_values": work - multiply_adds(lambda: part.query(maps[0].tokens)),
            "peak_bytes": peak_bytes(lambda form=form: gradients(form, part, maps), device),
        }
    with torch.no_grad():
        difference = (literal(part, *maps) - absorbed(part, *maps)).abs().max().item()
    pairs = zip(gradients(literal, part, maps), gradients(absorbed, part, maps), strict=True)
    report["max_difference"] = difference
    report["max_relative_gradient_difference"] = max(
        ((a - b).abs().max() / a.abs().max()).item() for a, b in pairs
    )
    report["ratios"] = {
        key: value / report["absorbed"][key]
        for key, value in report["literal"].items()
        if key != "peak_bytes"
    }
    return report


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [f"{'':34}{'literal':>12}{'absorbed':>12}{'ratio':>9}"]
    for label, key, unit in (
        ("forward, s", "forward_seconds", 1.0),
        ("forward, CPU s", "forward_cpu_seconds", 1.0),
        ("forward + backward, s", "forward_backward_seconds", 1.0),
        ("forward + backward, CPU s", "forward_backward_cpu_seconds", 1.0),
        ("10^9 mult-adds", "multiply_adds", 1e9),
        ("10^9 mult-adds, keys and values", "multiply_adds_keys_values", 1e9),
    ):
        a, b = report["literal"][key] / unit, report["absorbed"][key] / unit
        lines.append(f"{label:34}{a:12.3f}{b:12.3f}{a / b:8.1f}x")
    if report["literal"]["peak_bytes"] is not None:
        a, b = (report[form]["peak_bytes"] / 2**20 for form in ("literal", "absorbed"))
        lines.append(f"{'peak memory, MiB':34}{a:12.0f}{b:12.0f}{a / b:8.1f}x")
    lines.append(f"largest difference of outputs {report['max_difference']:.1e}")
    lines.append(f"largest relative difference of gradients {report['max_relative_gradient_difference']:.1e}")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a thirtieth of the published size")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    specs = SMALL if options.small else FULL
    report = measure(specs, torch.device(options.device), options.repeats)
    report["setting"] = {
        "grids": [spec.grid for spec in specs],
        "channels": [spec.channels for spec in specs],
        "device": options.device,
        "threads": torch.get_num_threads(),
        "repeats": options.repeats,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    print(table(report))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
