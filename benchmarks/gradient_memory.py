"""What mapping the zeros of a gradient instead of filling them costs whoever reads the gradient.

Two stacks of 64 matrices, as one layer of experts has, of which two are written: with ``torch.zeros``, with
the library's huge pages, and with ordinary pages. Then what a training step does to gradients: their norm,
clipping, fused AdamW. CPU milliseconds of one thread, the middle of so many turns.
"""

from __future__ import annotations

import argparse
import json
import math
import mmap
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from vlmix.moe.memory import gradient_stack, huge_page

SHAPES = ((64, 256, 256), (64, 256, 128))
WRITTEN = [3, 40]
READERS = ("nothing", "norm", "clip", "adamw", "clip, adamw")
IN_A_ROW = 4  # of which the first is not counted: it finds the memory of another way


def filled(like: Tensor) -> Tensor:
    """What torch does."""
    return torch.zeros_like(like)


def huge(like: Tensor) -> Tensor:
    """What the library does, which fills too where the two matrices lie in most pages."""
    return gradient_stack(like, WRITTEN)


def ordinary(like: Tensor) -> Tensor:
    """Mapped in ordinary pages."""
    memory = mmap.mmap(-1, like.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=like.dtype, count=math.prod(like.shape)).view(like.shape)


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "torch.zeros": filled,
    "huge pages": huge,
    "ordinary": ordinary,
}


def step(
    make: Callable[[Tensor], Tensor],
    parameters: list[nn.Parameter],
    values: list[Tensor],
    optimizer: torch.optim.Optimizer,
    reader: str,
) -> None:
    """Make the gradients and have them read."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.grad = None
        parameter.grad = make(parameter.detach())
        for expert in WRITTEN:
            parameter.grad[expert] = value
    if reader == "norm":
        nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if "clip" in reader:
        nn.utils.clip_grad_norm_(parameters, 1.0)
    if "adamw" in reader:
        optimizer.step()


def measure(dtype: torch.dtype, reader: str, turns: int) -> dict[str, float]:
    """Milliseconds of every way."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    values = [torch.randn(shape[1:], generator=generator).to(dtype) for shape in SHAPES]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(turns):
        for way, make in WAYS.items():
            start = 0.0
            for number in range(IN_A_ROW):
                if number == 1:
                    start = time.process_time()
                step(make, parameters, values, optimizer, reader)
            taken[way].append((time.process_time() - start) / (IN_A_ROW - 1))
    return {way: statistics.median(times) * 1e3 for way, times in taken.items()}


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=41)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, dict[str, float]]] = {}
    print(f"{'':10}{'read by':14}" + "".join(f"{way:>14}" for way in WAYS))
    for name, dtype in {"float32": torch.float32, "bfloat16": torch.bfloat16}.items():
        found[name] = {reader: measure(dtype, reader, options.turns) for reader in READERS}
        for reader, times in found[name].items():
            print(f"{name:10}{reader:14}" + "".join(f"{ms:14.2f}" for ms in times.values()))
    if options.out:
        setting = {"torch": torch.__version__, "turns": options.turns, "huge_page_bytes": huge_page()}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(
            json.dumps({"ms": found, "setting": setting}, indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
