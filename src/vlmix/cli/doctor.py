"""``vlmix doctor``: versions, devices, what is missing and how to get it."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import typer
from packaging.version import Version
from rich.table import Table

from vlmix import __version__
from vlmix.cli.console import out

_FLOORS = {
    "torch": "2.11",
    "torchvision": "0.26",
    "transformers": "5.17",
    "timm": "1.0.20",
    "peft": "0.18",
    "safetensors": "0.6",
    "pillow": "12.3",
    "pydantic": "2.11",
}
_GIB = 2**30


def doctor() -> None:
    """Check this machine: packages, devices, memory and disk. Exit code 1 if something needed is missing."""
    table = Table(box=None, padding=(0, 2), show_header=False)
    healthy = all([_packages(table), _devices(table), _room(table)])
    out().print(table)
    raise typer.Exit(0 if healthy else 1)


def _packages(table: Table) -> bool:
    table.add_row("[green]ok[/]", "vlmix", f"{__version__}, Python {platform.python_version()}")
    healthy = True
    for name, floor in _FLOORS.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            found = ""
        good = bool(found) and Version(found) >= Version(floor)
        healthy &= good
        remedy = "" if good else f" — needs >= {floor}: pip install '{name}>={floor}'"
        table.add_row(
            "[green]ok[/]" if good else "[red]missing[/]", name, (found or "not installed") + remedy
        )
    return healthy


def _devices(table: Table) -> bool:
    import torch

    table.add_row(
        "[green]ok[/]", "processor", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads for torch"
    )
    if not torch.accelerator.is_available():
        table.add_row(
            "[yellow]none[/]", "accelerator", "everything runs on the processor, large models slowly"
        )
        return True
    for index in range(torch.accelerator.device_count()):
        kind = torch.accelerator.current_accelerator()
        name = torch.cuda.get_device_name(index) if torch.cuda.is_available() else str(kind)
        table.add_row("[green]ok[/]", f"accelerator {index}", name)
    return True


def _room(table: Table) -> bool:
    free = shutil.disk_usage(Path.cwd()).free / _GIB
    good = free > 2
    table.add_row(
        "[green]ok[/]" if good else "[red]low[/]",
        "disk",
        f"{free:.0f} GiB free here"
        + ("" if good else " — checkpoints need room: free some or choose another --out"),
    )
    return good
