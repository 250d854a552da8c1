"""Where the command line writes: results on standard output, everything else on standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import NoReturn

from rich.console import Console
from rich.markup import escape


def out() -> Console:
    """The console for results."""
    return Console(highlight=False)


def err() -> Console:
    """The console for progress and messages."""
    return Console(stderr=True, highlight=False)


def show_warnings(console: Console, warnings: Iterable[str]) -> None:
    """Print one yellow line for each."""
    for line in warnings:
        console.print(f"warning: {line}", style="yellow", markup=False, soft_wrap=True)


def fail(message: str, code: int) -> NoReturn:
    """Print one message and leave with ``code``."""
    err().print(f"[bold red]vlmix:[/] {escape(message)}", soft_wrap=True)
    sys.exit(code)
