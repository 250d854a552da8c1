"""Where the command line writes: results on standard output, everything else on standard error."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import NoReturn

from rich.console import Console
from rich.markup import escape


def out() -> Console:
    """The console for results."""
    return Console(highlight=False, quiet=bool(process_number()))


def err() -> Console:
    """The console for progress and messages."""
    return Console(stderr=True, highlight=False, quiet=bool(process_number()))


def process_number() -> int:
    """Which of the processes that torchrun started this is; the first one prints."""
    return int(os.environ.get("RANK", "0"))


def show_warnings(console: Console, warnings: Iterable[str]) -> None:
    """Print one yellow line for each."""
    for line in warnings:
        console.print(f"warning: {line}", style="yellow", markup=False, soft_wrap=True)


def fail(message: str, code: int) -> NoReturn:
    """Print one message and leave with ``code``."""
    where = f"process {process_number()}: " if "RANK" in os.environ else ""
    Console(stderr=True, highlight=False).print(
        f"[bold red]vlmix:[/] {escape(where + message)}", soft_wrap=True
    )
    sys.exit(code)
