"""A process that runs one trial: the job on standard input, its entry on standard output.

The pipe it reads from stays open while somebody waits. When it closes, the run saves and ends, so that a
search that was killed leaves no process behind that holds a trial's folder.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TextIO

from rich.console import Console

from vlmix.core.errors import VlmixError
from vlmix.core.settings import read_settings
from vlmix.train.recipe import Recipe


def run_line(line: str, words: TextIO, threads: int) -> str:
    """Run the job of one line with so many threads and return its entry as JSON; ``words`` take the rest.

    Raises:
        VlmixError: if the machine is at fault, or the run was stopped.

    """
    import torch

    from vlmix.search.trial import run_trial

    torch.set_num_threads(threads)
    job = json.loads(line)
    recipe = read_settings(Recipe, job["recipe"])
    console = Console(file=words, width=160)
    entry = run_trial(job["key"], recipe, Path(job["folder"]), job["told"], console)
    return json.dumps(entry.model_dump(mode="json"))


def run_elsewhere(line: str, log: str, threads: int) -> str:
    """The same for a process that others started; words go to the file ``log``.

    Raises:
        VlmixError: as above.

    """
    with Path(log).open("a", encoding="utf-8") as words:
        return run_line(line, words, threads)


def _end_when_alone() -> None:
    """Ask this process to stop once nobody holds the other end."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    """Read the job, run it, write the entry."""
    line = sys.stdin.readline()
    threading.Thread(target=_end_when_alone, daemon=True).start()
    try:
        told = run_line(line, sys.stderr, int(os.environ.get("OMP_NUM_THREADS", "1")))
    except VlmixError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.write(told)
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the thread still waits for its pipe
