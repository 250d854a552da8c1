"""Pickled weights: tensors only, read by a child process that may do nothing else, copied to safetensors.

A pickle can run code. torch's restricted reader refuses everything but tensors; the child process is the
second wall, so that even a fault in that reader does not happen where the user's work is. The file is
mapped, not loaded, and copied a part at a time; files of torch before 1.6 cannot be mapped.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

from vlmix.core.errors import CheckpointError
from vlmix.core.progress import Told, quiet

PART_BYTES = 256 << 20
_LOOK_EVERY_SECONDS = 0.5
_FORBIDDEN = "unsupported"  # torch's word for what a pickle asked for in vain

_CHILD = """
import sys, zipfile, torch
from safetensors.torch import save_file
source, target, most = sys.argv[1], sys.argv[2], int(sys.argv[3])
found = torch.load(source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source))
for key in ("state_dict", "model"):
    found = found[key] if isinstance(found.get(key), dict) else found
wrong = [name for name, value in found.items() if not isinstance(value, torch.Tensor)]
if wrong:
    raise SystemExit(f"holds something else than tensors: {wrong[:3]}")
held, size, parts = {}, 0, 0
for name, value in found.items():
    if held and size + value.nbytes > most:
        save_file(held, f"{target}-{parts:05d}.safetensors")
        held, size, parts = {}, 0, parts + 1
    held[name] = value.detach().clone().contiguous()
    size += value.nbytes
save_file(held, f"{target}-{parts:05d}.safetensors")
"""


def as_safetensors(path: Path, scratch: Path, told: Told = quiet) -> list[Path]:
    """Copies of a pickled file's tensors in ``scratch``, in files of about ``PART_BYTES``.

    Raises:
        CheckpointError: if it holds anything but tensors, or cannot be read.

    """
    copy = uuid4().hex  # files of several folders may have the same name
    what = f"reading {path.name}, a pickle, with a restricted reader in a child process"
    size = path.stat().st_size
    told(what, 0, size)
    command = [sys.executable, "-I", "-c", _CHILD, str(path), str(scratch / copy), str(PART_BYTES)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        said = _watched(child, lambda: told(what, _bytes(scratch, copy), size))
    if child.returncode:
        lines = said.strip().splitlines() or ["no message"]
        why = next((line.strip() for line in lines if _FORBIDDEN in line.lower()), lines[-1])
        what = f"only plain tensors are read from a {path.suffix} file"
        raise CheckpointError(f"{path}: refused; {what}: {why[:300]}")
    told(what, size, size)
    return _copies(scratch, copy)


def _watched(child: subprocess.Popen[str], look: Callable[[], None]) -> str:
    """Wait for the child, looking at its work now and then; what it said on standard error."""
    try:
        while True:
            try:
                return child.communicate(timeout=_LOOK_EVERY_SECONDS)[1]
            except subprocess.TimeoutExpired:
                look()
    finally:
        child.kill()


def _copies(scratch: Path, copy: str) -> list[Path]:
    return sorted(scratch.glob(f"{copy}-*.safetensors"))


def _bytes(scratch: Path, copy: str) -> int:
    return sum(path.stat().st_size for path in _copies(scratch, copy))
