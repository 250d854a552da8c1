"""Experts here beside transformers' eager loop, its other kernels and a dense network of equal active size.

Same weights and the same random choices for all: k of E experts a token, each SwiGLU. Training is the forward
pass and the gradients of weights, tokens and shares; an update, measured for one token, is that and what
reads the gradients: clipping and AdamW. Times are taken in turns; ratios are eager's time over the other's in
the same turn, so above 1 is faster than eager. On a CPU they are times of this process, which others on the
machine disturb less; on an accelerator achieved TFLOP/s are given too. Peak memory is that of one step beyond
weights and inputs, on the CPU in a process of its own. "Zeros" does nothing but allocate the gradient of
every expert's weights and fill it with 0.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from vlmix.moe.experts import StackedExperts
from vlmix.moe.kernels import kernel_for

OURS, EAGER, DENSE, ZEROS = "vlmix", "eager", "dense", "zeros"
WAYS = (OURS, EAGER, "grouped_mm", "batched_mm", DENSE, ZEROS)
# Experts, choices, width, inner width of one expert.
SIZES = {
    "small": [(4, 2, 512, 1408), (16, 2, 256, 256), (64, 2, 256, 128), (64, 8, 256, 128)],
    "large": [(4, 2, 2048, 5632), (16, 2, 2048, 1408), (64, 8, 2048, 768)],
}
TOKENS, DTYPES = (1, 64, 1024), {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Batched products copy an expert for every choice: beyond this many bytes they are left out.
COPIES, TURN = 2**30, 0.03
# Least ratios to eager in training and in decoding, one token without gradients.
BARS = {4: 1 / 1.15, 16: 1.5, 64: 4.0}


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the table."""

    experts: int
    chosen: int
    width: int
    inner: int
    tokens: int
    dtype: str
    step: str

    @property
    def multiply_adds(self) -> int:
        """Of the three matrices, forward, and twice as many again for their gradients."""
        passes = 1 if self.step == "forward" else 3  # an update multiplies no matrices of its own
        return passes * 3 * self.tokens * self.chosen * self.width * self.inner

    def ways(self) -> list[str]:
        """Those that can run it."""
        copied = 3 * self.tokens * self.chosen * self.width * self.inner * DTYPES[self.dtype].itemsize
        left_out = {"batched_mm": copied > COPIES, ZEROS: self.step != "training"}
        return [way for way in WAYS if not left_out.get(way, False)]


class Dense(nn.Module):
    """What a token meets, in one network that all tokens share."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Choices play no part."""
        gate, up = self.up(x_TD).chunk(2, -1)
        return self.down(nn.functional.silu(gate) * up)


def network(way: str, case: Case, device: torch.device) -> nn.Module:
    """One way to compute the case, with weights that are the same in all ways but the dense one."""
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=case.width, intermediate_size=case.inner, num_local_experts=case.experts
    )
    config._experts_implementation = "grouped_mm" if way == OURS else way
    sizes = (case.width, case.inner, case.width)
    if way == DENSE:
        made = Dense(case.width, case.inner * case.chosen)
    elif way in (OURS, ZEROS):
        made = StackedExperts(config, case.experts, sizes, nn.SiLU(), gated=True)
    else:
        made = MixtralExperts(config)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return made.to(device, DTYPES[case.dtype])


def inputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, their experts, and the shares of those."""
    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(case.tokens, case.width, generator=generator).to(device, DTYPES[case.dtype])
    scores_TE = torch.randn(case.tokens, case.experts, generator=generator).softmax(-1)
    weights_TK, indices_TK = scores_TE.topk(case.chosen)
    shares_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return x_TD, indices_TK.to(device), shares_TK.to(device, x_TD.dtype)


def runner(way: str, case: Case, device: torch.device) -> Callable[[], Tensor]:
    """One step, ready to run; it gives the output."""
    made, (x_TD, indices_TK, shares_TK) = network(way, case, device), inputs(case, device)

    def forward() -> Tensor:
        with torch.no_grad():
            return made(x_TD, indices_TK, shares_TK)

    def training() -> Tensor:
        made.zero_grad(set_to_none=True)
        leaves = x_TD.detach().requires_grad_(), shares_TK.detach().requires_grad_()
        y_TD = made(leaves[0], indices_TK, leaves[1])
        y_TD.backward(torch.ones_like(y_TD))
        return y_TD.detach()

    def zeros() -> Tensor:
        made.zero_grad(set_to_none=True)
        for parameter in made.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return x_TD

    optimizer = torch.optim.AdamW(made.parameters(), fused=True)

    def update() -> Tensor:
        y_TD = training()
        nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimizer.step()
        return y_TD

    return zeros if way == ZEROS else {"forward": forward, "training": training, "update": update}[case.step]


def seconds(run: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Of one run, the mean of so many."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    _wait(device)
    start = clock()
    for _ in range(repeats):
        run()
    _wait(device)
    return (clock() - start) / repeats


def measure(case: Case, turns: int, device: torch.device, peaks: dict[str, int]) -> dict[str, Any]:
    """Every way to compute the case, in turns."""
    runs = {way: runner(way, case, device) for way in case.ways()}
    # Before anything else, since updates change the weights.
    mine, theirs = runs[OURS]().float(), runs[EAGER]().float()
    # As often for all: what runs once finds caches full of what ran before, what runs often does not.
    repeats = max(1, int(TURN / seconds(runs[EAGER], 3, device)))
    taken: dict[str, list[float]] = {way: [] for way in runs}
    for turn in range(turns):
        for way in list(runs) if turn % 2 else list(runs)[::-1]:
            taken[way].append(seconds(runs[way], repeats, device))
    row: dict[str, Any] = {
        **asdict(case),
        "kernel": kernel_for(_stacked(case, device), DTYPES[case.dtype], device),
        "difference": ((mine - theirs).abs().max() / theirs.abs().max()).item(),
    }
    for way, times in taken.items():
        pairs = sorted(a / b for a, b in zip(taken[EAGER], times, strict=True))
        quarter = len(pairs) // 4
        middle = statistics.median(times)
        row[way] = {
            "seconds": middle,
            "ratio": statistics.median(pairs),
            "middle_half": [pairs[quarter], pairs[-1 - quarter]],
            "peak_bytes": peaks[way] if device.type == "cpu" else accelerator_peak(runs[way]),
            "tflops": 2 * case.multiply_adds / middle / 1e12,
        }
    return row


def accelerator_peak(run: Callable[[], Any]) -> int:
    """Bytes that one step allocates at most beyond what lay there before."""
    torch.accelerator.reset_peak_memory_stats()
    before = torch.accelerator.memory_allocated()
    run()
    return torch.accelerator.max_memory_allocated() - before


def cpu_peaks(cases: list[Case]) -> list[dict[str, int]]:
    """The same on the CPU: resident memory of fresh processes that run one step each."""
    fork = multiprocessing.get_context("fork")
    found = []
    for case in cases:
        peaks = {}
        for way in case.ways():
            here, there = fork.Pipe()
            child = fork.Process(target=_peak, args=(way, case, there))
            child.start()
            peaks[way] = here.recv()
            child.join()
        found.append(peaks)
    return found


def _peak(way: str, case: Case, pipe: Any) -> None:
    run = runner(way, case, torch.device("cpu"))
    run()
    # What libraries keep is no part of a step, and freed memory that the process still holds would hide one.
    run = runner(way, case, torch.device("cpu"))
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS:")
    run()
    pipe.send(_status("VmHWM:") - before)


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """The least ratios to eager, beside what they should be."""
    lines = []
    for experts, bar in BARS.items():
        # Four experts are held to their bar in either step; the others gain in the backward pass.
        steps = ("forward", "training") if experts == 4 else ("training",)
        mine = [row for row in rows if row["experts"] == experts and row["step"] in steps]
        if mine:
            least = min(mine, key=lambda r: r[OURS]["ratio"])
            where = f"k={least['chosen']}, {least['tokens']} tokens, {least['dtype']}, {least['step']}"
            most = f", zeros alone {least[ZEROS]['ratio']:.2f}" if ZEROS in least else ""
            short = sum(r[OURS]["ratio"] < bar for r in mine)
            lines.append(
                f"E={experts}: least {least[OURS]['ratio']:.2f} ({where}{most}); bar {bar:.2f}, {short} below"
            )
    decoding = [r[OURS]["ratio"] for r in rows if r["tokens"] == 1 and r["step"] == "forward"]
    lines.append(f"one token, forward: least {min(decoding):.2f}; bar 1.00")
    updates = [r[OURS]["ratio"] for r in rows if r["step"] == "update"]
    lines.append(f"one token, update: {min(updates):.2f} to {max(updates):.2f}; no bar")
    return lines


def table(rows: list[dict[str, Any]]) -> str:
    """The report as text: times in ms, ratios to eager, peaks in MiB."""
    head = f"{'E':>3}{'k':>3}{'width':>6}{'inner':>6}{'tokens':>7} {'dtype':9}{'step':9}{'eager, ms':>10}"
    head += "".join(f"{way:>12}" for way in WAYS if way != EAGER)
    lines = [f"{head}{'TFLOP/s':>9}   MiB: {OURS}, {EAGER}, {DENSE}"]
    for row in rows:
        line = f"{row['experts']:3}{row['chosen']:3}{row['width']:6}{row['inner']:6}{row['tokens']:7} "
        line += f"{row['dtype']:9}{row['step']:9}{row[EAGER]['seconds'] * 1e3:10.3f}"
        line += "".join(f"{row[w]['ratio']:12.2f}" if w in row else f"{'':12}" for w in WAYS if w != EAGER)
        peaks = (f"{row[way]['peak_bytes'] / 2**20:7.1f}" for way in (OURS, EAGER, DENSE))
        lines.append(f"{line}{row[OURS]['tflops']:9.2f}      {' '.join(peaks)}")
    return "\n".join([*lines, *verdicts(rows)])


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default=_best_device(), help="an accelerator unless there is none")
    parser.add_argument("--size", choices=tuple(SIZES), help="large on an accelerator, else small")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, load = torch.device(options.device), os.getloadavg()[0]
    size = options.size or ("small" if device.type == "cpu" else "large")
    cases = [
        Case(*sizes, tokens, dtype, step)
        for dtype in DTYPES
        for sizes in SIZES[size]
        for tokens in TOKENS
        for step in ("forward", "training", "update")
        if step != "update" or tokens == 1
    ]
    # Before anything runs here: a child has the memory its parent ever touched.
    peaks = cpu_peaks(cases) if device.type == "cpu" else [{} for _ in cases]
    rows = [measure(case, options.turns, device, peak) for case, peak in zip(cases, peaks, strict=True)]
    print(table(rows))
    if options.out:
        setting = {
            "device": options.device,
            "load_before": load,
            "threads": options.threads,
            "turns": options.turns,
            "torch": torch.__version__,
            "machine": platform.machine(),
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"cases": rows, "verdicts": verdicts(rows), "setting": setting}, indent=2)
        options.out.write_text(text + "\n", encoding="utf-8")


def _stacked(case: Case, device: torch.device) -> StackedExperts:
    made = network(OURS, case, device)
    assert isinstance(made, StackedExperts)
    return made


def _status(key: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition(key)[2].split()[0]) * 1024


def _best_device() -> str:
    device = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if device is None else device.type


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


if __name__ == "__main__":
    main()
