"""Folders that all processes write and one publishes, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

from vlmix.core.files import publish, storage_errors
from vlmix.train.parallel.processes import Processes


def publish_together(
    folder: Path, processes: Processes, fill: Callable[[Path], Iterable[Path]], finish: Callable[[Path], None]
) -> None:
    """Every process puts files into a new folder with ``fill``, which names them; the first adds the rest.

    The folder then becomes ``folder`` in one step. What fails on one process fails on all.

    Raises:
        DiskFullError: if there is no room; what was there before is intact.

    """
    what = f"saving {folder}"
    with processes.together(what), ExitStack() as stack:
        with processes.together(what):
            made = stack.enter_context(publish(folder)) if processes.is_main else folder
        new = Path(processes.share(str(made)))
        with processes.together(what), storage_errors(folder):
            for path in fill(new):
                _sync(path)
        if processes.is_main:
            finish(new)


def _sync(path: Path) -> None:
    """Force a file to disk from the machine that wrote it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
