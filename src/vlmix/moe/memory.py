"""Gradients of stacks that are mostly zeros, in memory that is zero already and is there once it is written.

A stack of 64 experts of which a token chose two has a gradient of which 62 parts are 0. Linux hands out pages
of zeros; in huge ones, what reads them (a norm, an optimizer) finds all of those that nobody wrote to in one
and the same page. With ordinary pages each first look at one would cost more than filling it.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

_HUGE_PAGES: Final = Path("/sys/kernel/mm/transparent_hugepage")


def gradient_stack(stack_EOI: Tensor, experts: Sequence[int]) -> Tensor:
    """Room for a gradient: the parts of ``experts`` (ascending) are still to be written, the others 0."""
    made_EOI = sparse_zeros(stack_EOI, experts)
    if made_EOI is None:
        made_EOI = torch.empty_like(stack_EOI, memory_format=torch.contiguous_format)
        for before, expert in itertools.pairwise((-1, *experts, len(made_EOI))):
            if before + 1 < expert:
                _clear(made_EOI[before + 1 : expert])
    return made_EOI


def _clear(part: Tensor) -> None:
    """Fill contiguous memory with 0; on a CPU without reading first what it overwrites, as torch does."""
    if part.device.type == "cpu":
        ctypes.memset(part.data_ptr(), 0, part.nbytes)
    else:
        part.zero_()


def sparse_zeros(stack_EOI: Tensor, experts: Sequence[int]) -> Tensor | None:
    """Zeros of a stack's shape, most of whose memory is never touched if only ``experts`` are written to.

    Nothing where those lie in more than half of its huge pages, or where there are no huge pages.
    """
    page = huge_page() if stack_EOI.device.type == "cpu" else 0
    size = stack_EOI.numel() * stack_EOI.element_size()
    # Each part begins and ends in some page; parts that share one are counted twice.
    pages = len(experts) * (size // len(stack_EOI) // page + 1) if page else 0
    if not page or 2 * pages > size // page:
        return None
    try:
        # A page more, since a mapping need not begin where a huge page does.
        memory = mmap.mmap(-1, size + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return None
    start = -torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr() % page
    zeros = torch.frombuffer(memory, dtype=stack_EOI.dtype, offset=start, count=stack_EOI.numel())
    return zeros.view(stack_EOI.shape)


@functools.cache
def huge_page() -> int:
    """Bytes of a huge page, 0 where none can be asked for."""
    try:
        if "[never]" in (_HUGE_PAGES / "enabled").read_text(encoding="ascii"):
            return 0
        return int((_HUGE_PAGES / "hpage_pmd_size").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0
