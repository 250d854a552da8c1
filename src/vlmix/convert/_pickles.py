"""``.bin`` files: tensors only, read by a child process that may do nothing else, then copied to safetensors.

A pickle can run code. torch's restricted reader refuses everything but tensors; the child process is the
second wall, so that even a fault in that reader does not happen where the user's work is.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from uuid import uuid4

from vlmix.core.errors import CheckpointError

_CHILD = """
import sys, torch
from safetensors.torch import save_file
found = torch.load(sys.argv[1], map_location="cpu", weights_only=True, mmap=True)
found = found.get("state_dict", found)
wrong = [name for name, value in found.items() if not isinstance(value, torch.Tensor)]
if wrong:
    raise SystemExit(f"holds something else than tensors: {wrong[:3]}")
save_file({name: value.detach().clone().contiguous() for name, value in found.items()}, sys.argv[2])
"""


def as_safetensors(path: Path, scratch: Path) -> Path:
    """A copy of a pickled file's tensors in ``scratch``.

    Raises:
        CheckpointError: if it holds anything but tensors, or cannot be read.

    """
    copy = scratch / f"{uuid4().hex}.safetensors"  # files of several folders may have the same name
    done = subprocess.run(
        [sys.executable, "-I", "-c", _CHILD, str(path), str(copy)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CheckpointError(f"{path}: refused; only plain tensors are read from a .bin file: {last[:300]}")
    return copy
