"""Tables of Hugging Face `datasets`: on disk or from the hub, read row by row as they are stored.

Nothing is decoded here: pictures come as their encoded bytes, which only the image gateway opens. No code
that comes with a data set is run.
"""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any, Final

from vlmix.core.errors import ImageError, InputError
from vlmix.core.extras import extra
from vlmix.core.images import MAX_FILE_BYTES
from vlmix.core.stored import StoredPicture

if TYPE_CHECKING:
    from datasets import Dataset

_SAVED: Final = ("state.json", "dataset_dict.json")
_FILES: Final[dict[str, str]] = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".jsonl": "json",
    ".json": "json",
}


_SPLITS: Final = (
    frozenset({"train", "training"}),
    frozenset({"validation", "valid", "val", "dev"}),
    frozenset({"test", "testing", "eval", "evaluation"}),
)
"""Words for one split each, as `datasets` reads them in names of files."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a table is: ``path`` is a folder, a file or a hub id; the rest as `datasets` names it."""

    path: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    cache: str | None = None


@dataclass(frozen=True, slots=True)
class Cell(StoredPicture):
    """A picture in a table: its row, its column, and which of the pictures there."""

    place: Place
    column: str
    row: int
    number: int = 0

    @property
    def name(self) -> str:
        """The table's path, row and column."""
        return f"{self.place.path}: row {self.row}, {self.column}"

    def open(self) -> IO[bytes]:
        """The encoded bytes, read from the table when asked for.

        Raises:
            ImageError: if there are none, or more than a picture may have.

        """
        stored = as_list(cell(self.place, (self.column,), self.row)[self.column])
        values = [value for value in stored if value is not None]
        value = values[self.number] if self.number < len(values) else None
        raw = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(raw, bytes):
            raise ImageError(f"{self.name} holds no encoded picture. Remove its row.")
        if len(raw) > MAX_FILE_BYTES:
            raise ImageError(
                f"{self.name} has {len(raw)} bytes, more than {MAX_FILE_BYTES}. Save it smaller."
            )
        return io.BytesIO(raw)


def as_list(value: Any) -> list[Any]:
    """What a picture column holds, as a list: nothing, one or several."""
    return [] if value is None else value if isinstance(value, list) else [value]


def rows_in(place: Place) -> int:
    """Rows of a table.

    Raises:
        InputError: if it cannot be opened.

    """
    return len(_table(place))


def columns_of(place: Place) -> list[str]:
    """Columns of a table."""
    return list(_table(place).column_names)


def cell(place: Place, columns: tuple[str, ...], row: int) -> dict[str, Any]:
    """Some columns of one row, as they are stored."""
    return _view(place, columns)[row].to_pylist()[0]


def library() -> ModuleType:
    """The package `datasets`.

    Raises:
        InputError: if it is not installed.

    """
    with extra("data", "a table"):
        import datasets
    return datasets


def pictures_in(place: Place, column: str, row: int) -> list[str | None]:
    """For each picture of a row its path, or None where the table holds it; no byte of it is copied."""
    value = _view(place, (column,))[row].column(0)[0]
    if not value.is_valid:
        return []
    several = hasattr(value, "values") and not hasattr(value, "keys")  # a list of pyarrow, not a struct
    return [_path(one) for one in (value.values if several else (value,)) if one.is_valid]


def _path(value: Any) -> str | None:
    fields = dict(value.items()) if hasattr(value, "keys") else {}
    if fields and fields["bytes"].is_valid:
        return None
    path = fields.get("path", value)
    return path.as_py() if isinstance(path.as_py(), str) else None


@lru_cache(maxsize=64)
def _view(place: Place, columns: tuple[str, ...]) -> Any:
    return _table(place).select_columns(list(columns)).with_format("arrow")


@lru_cache(maxsize=64)
def _table(place: Place) -> Dataset:
    datasets = library()
    try:
        found = _loaded(datasets, place)
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 - the library raises what its many readers raise
        first = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(
            f"{place.path}: datasets cannot open it ({first}). Give a folder of save_to_disk, parquet, "
            "arrow or JSON files, or a hub id."
        ) from None
    if isinstance(found, datasets.DatasetDict):
        if place.split not in found:
            raise InputError(f"{place.path}: no split {place.split!r}, only {', '.join(found)}. Set `split`.")
        found = found[place.split]
    return found


def _loaded(datasets: ModuleType, place: Place) -> Any:
    path = Path(place.path)
    if is_saved(path):
        return datasets.load_from_disk(str(path))
    more = {"cache_dir": place.cache} if place.cache else {}
    if not path.exists():
        return datasets.load_dataset(
            place.path, place.name, split=place.split, revision=place.revision, **more
        )
    if not (listed := table_files(path)):
        raise InputError(f"{path}: no {', '.join(_FILES)} files there")
    files = [str(file) for file in _of_split(path, listed, place.split)]
    if all(file.endswith(".arrow") for file in files):
        return datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files])
    kind = _FILES[Path(files[0]).suffix]
    return datasets.load_dataset(kind, data_files=files, split="train", **more)


def is_local(path: str) -> bool:
    """Whether something is at ``path``, or it can be no hub id, which is ``NAME`` or ``OWNER/NAME``."""
    place = Path(path)
    return (
        place.exists()
        or place.is_absolute()
        or path.startswith(".")
        or len(place.parts) > 2
        or (place.suffix in _FILES)
    )


def table_files(path: Path) -> list[Path]:
    """The files of a table: of the first kind there is in a folder, in order."""
    if path.is_file():
        return [path] if path.suffix in _FILES else []
    for suffix in _FILES:
        if found := sorted(path.rglob(f"*{suffix}")):
            return found
    return []


def _of_split(folder: Path, files: list[Path], split: str) -> list[Path]:
    """Those of a folder's files whose names say that they belong to a split; all where none names any.

    As on the hub: a word of the path below the folder, such as ``data/train-00000-of-00004.parquet``.

    Raises:
        InputError: if files name other splits alone.

    """
    if files == [folder]:
        return files
    words = [{*re.split(r"[^a-z]+", file.relative_to(folder).as_posix().lower())} for file in files]
    same = next((names for names in _SPLITS if split in names), frozenset({split}))
    if found := [file for file, said in zip(files, words, strict=True) if said & {split.lower(), *same}]:
        return found
    others = sorted({min(said & names) for said in words for names in _SPLITS if said & names})
    if others or split not in _SPLITS[0]:
        known = f"files of {', '.join(others)}" if others else "files that name no split"
        raise InputError(f"{folder}: no file of the split {split!r}, only {known}. Set `split`")
    return files


def is_saved(path: Path) -> bool:
    """Whether a folder was written by ``save_to_disk``."""
    return any((path / name).is_file() for name in _SAVED)


def parsed(value: Any) -> Any:
    """A column that holds JSON as text is read as JSON; anything else stays."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value
