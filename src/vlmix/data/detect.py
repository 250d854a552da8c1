"""Which source reads what lies at a path: decided by what is there, never by what a folder is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmix.core.errors import InputError
from vlmix.data.tables import is_saved, table_files

_ROWS = (".json", ".jsonl")


def source_at(path: str, images: Path | None = None) -> dict[str, Any]:
    """Raw settings of the source that reads ``path``; ``images`` is the folder of pictures that lie outside.

    Raises:
        InputError: if nothing is there that a source could read.

    """
    place, beside = Path(path), {} if images is None else {"images": str(images)}
    if place.suffix == ".tar" or (not place.exists() and any(sign in path for sign in "*?{")):
        return {"kind": "webdataset", "shards": path}
    if not place.exists():
        raise InputError(f"{path} does not exist. Give a LLaVA JSON, a folder of tars or tables, or a recipe")
    if place.is_dir():
        return _in_folder(place, beside)
    if place.suffix in _ROWS:
        return {"kind": "llava_json", "path": path, **beside}
    if table_files(place):
        return {"kind": "hf_dataset", "path": path, **beside}
    raise InputError(
        f"{path}: no known data set. Known: .json, .jsonl, .tar, .parquet, .arrow, a recipe's .yaml"
    )


def _in_folder(folder: Path, beside: dict[str, str]) -> dict[str, Any]:
    if any(folder.glob("*.tar")) or any(folder.glob("*.t*gz")):
        return {"kind": "webdataset", "shards": str(folder)}
    tables = [file for file in table_files(folder) if file.suffix not in _ROWS]
    if is_saved(folder) or tables:
        return {"kind": "hf_dataset", "path": str(folder), **beside}
    rows = [file for file in sorted(folder.iterdir()) if file.suffix in _ROWS]
    if len(rows) == 1:
        return {"kind": "llava_json", "path": str(rows[0]), **beside}
    what = f"{len(rows)} JSON files; give one of them" if rows else "no tars, tables or LLaVA JSON"
    raise InputError(f"{folder}: {what}")
