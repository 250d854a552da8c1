"""Any source as tar shards: pictures byte for byte, bad rows written down, the folder whole or not there."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from PIL import Image

from vlmix import __version__
from vlmix.core.errors import ImageError, InputError, SampleError
from vlmix.core.files import publish, write_json, write_manifest
from vlmix.core.images import encoded_image
from vlmix.core.interfaces import Source
from vlmix.core.progress import Told, quiet
from vlmix.core.sample import ImageRef, Sample
from vlmix.data.each_row import each_row
from vlmix.data.json_rows import MAX_ROW_BYTES
from vlmix.data.ledger import FILE_NAME, Ledger
from vlmix.data.packed_rows import packed

SCHEMA: Final = "vlmix.shards/1"
INFO: Final = "packed.json"
_ENDINGS: Final = {"PNG": "png", "JPEG": "jpg", "WebP": "webp", "GIF": "gif", "BMP": "bmp"}
_LOSSY: Final = {"JPEG", "WebP"}
_QUALITY: Final = 95
_HEADER_BYTES: Final = 1024  # of a member: its header and what fills its last block, at most


@dataclass(frozen=True, slots=True)
class Packed:
    """One row ready to be written: its JSON and its pictures by their endings; or why it is left out."""

    index: int
    line: int
    name: str
    reason: str = ""
    row: bytes = b""
    pictures: tuple[tuple[str, bytes], ...] = ()


@dataclass(frozen=True, slots=True)
class PackRow:
    """Packs one row of a source; travels to other processes. Larger pictures than ``max_side`` shrink."""

    source: Source
    max_side: int | None = None

    def __call__(self, index: int) -> Packed:
        """Read row ``index`` and check that every picture opens."""
        line, name = self.source.line(index), ""
        try:
            sample = self.source[index]
            name = sample.id
            pictures = tuple(self._picture(image) for image in sample.images)
            tails = [tail for tail, _ in pictures]
            names = tails if len(tails) == 1 else [f"{number}.{tail}" for number, tail in enumerate(tails)]
            row = _as_json(sample)
        except SampleError as error:
            return Packed(index, line, error.sample_id or name, error.reason)
        except ImageError as error:
            return Packed(index, line, name, str(error))
        raws = (raw for _, raw in pictures)
        return Packed(index, line, name, row=row, pictures=tuple(zip(names, raws, strict=True)))

    def _picture(self, picture: ImageRef) -> tuple[str, bytes]:
        raw, kind = encoded_image(picture.source)
        image = picture.open()
        if self.max_side is None or max(image.size) <= self.max_side:
            return _ENDINGS[kind], raw
        image = image.copy()
        image.thumbnail((self.max_side, self.max_side), Image.Resampling.LANCZOS)
        kind, buffer = "JPEG" if kind in _LOSSY else "PNG", io.BytesIO()
        image.save(buffer, format=kind, **({"quality": _QUALITY} if kind == "JPEG" else {}))
        return _ENDINGS[kind], buffer.getvalue()


def pack(
    source: Source,
    folder: Path,
    *,
    shard_bytes: int = 10**9,
    max_side: int | None = None,
    max_bad: float = 0.01,
    workers: int = 0,
    told: Told = quiet,
) -> Ledger:
    """Write the rows of ``source`` to ``folder`` as shards of about ``shard_bytes``, and return the counts.

    The folder appears when everything is written; what stops before leaves nothing.

    Raises:
        InputError: if the folder exists.
        DataError: if more than the share ``max_bad`` of the rows is bad.

    """
    if folder.exists():
        raise InputError(f"{folder} exists. Choose another folder, or remove it first")
    kind = source.settings.kind
    with publish(folder) as new:
        ledger = Ledger(new / FILE_NAME, max_bad=max_bad)
        with _Shards(new, shard_bytes) as shards:
            for done in each_row(PackRow(source, max_side), len(source), workers):
                if done.reason:
                    ledger.quarantine((kind, done.index), done.line, done.name, done.reason)
                else:
                    shards.add(f"{ledger.used:09d}", done)
                    ledger.used += 1
                told("packing", done.index + 1, len(source))
        counts = {"read": ledger.read, "used": ledger.used, "quarantined": ledger.quarantined}
        settings = source.settings.model_dump(mode="json")
        info = {"rows": counts, "source": settings, "max_side": max_side, "vlmix": __version__}
        write_json(new / INFO, {"schema": SCHEMA, "shards": shards.count, **info})
        write_manifest(new, SCHEMA)
    ledger.path = folder / FILE_NAME
    return ledger


class _Shards:
    """Tar files of about one size, equal for equal rows: no clock and no user is written."""

    def __init__(self, folder: Path, most: int) -> None:
        self.folder, self.most, self.count, self._size = folder, most, 0, 0
        self._tar: tarfile.TarFile | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tar is not None:
            self._tar.close()

    def add(self, key: str, row: Packed) -> None:
        """Write one row, to a new shard where this one is full; a row is never divided."""
        size = sum(len(raw) + _HEADER_BYTES for _, raw in _members(row))
        if self._tar is None or (self._size and self._size + size > self.most):
            self._next()
        self._size += size
        for tail, raw in _members(row):
            info = tarfile.TarInfo(f"{key}.{tail}")
            info.size = len(raw)
            if self._tar is not None:
                self._tar.addfile(info, io.BytesIO(raw))

    def _next(self) -> None:
        if self._tar is not None:
            self._tar.close()
        path = self.folder / f"{self.count:06d}.tar"
        self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 - closed by the next
        self.count, self._size = self.count + 1, 0


def _as_json(sample: Sample) -> bytes:
    row = json.dumps(packed(sample), ensure_ascii=False, allow_nan=False).encode()
    if len(row) > MAX_ROW_BYTES:
        raise SampleError(f"the row has {len(row)} bytes, more than {MAX_ROW_BYTES}")
    return row


def _members(row: Packed) -> Iterator[tuple[str, bytes]]:
    yield "json", row.row
    yield from row.pictures
