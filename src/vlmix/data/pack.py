"""Any source as tar shards: pictures byte for byte, bad rows written down, the folder whole or not there."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from PIL import Image

from vlmix import __version__
from vlmix.core.errors import ImageError, InputError, SampleError
from vlmix.core.files import run_lock, settle, storage_errors, write_json, write_manifest
from vlmix.core.images import encoded_image
from vlmix.core.interfaces import Source
from vlmix.core.progress import Told, quiet
from vlmix.core.sample import ImageRef, Sample
from vlmix.data.each_row import each_row
from vlmix.data.json_rows import MAX_ROW_BYTES
from vlmix.data.ledger import FILE_NAME, Ledger
from vlmix.data.pack_job import Packed, PackJob, ShardWriter, seen_files, tidy
from vlmix.data.packed_rows import packed

SCHEMA: Final = "vlmix.shards/1"
INFO: Final = "packed.json"
_ENDINGS: Final = {"PNG": "png", "JPEG": "jpg", "WebP": "webp", "GIF": "gif", "BMP": "bmp"}
_LOSSY: Final = {"JPEG", "WebP"}
_QUALITY: Final = 95


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

    The folder appears when everything is written. What stops before, however it does, leaves its finished
    shards in a hidden folder beside it, and packing the same again goes on behind them: the bytes are those
    of packing at one go.

    Raises:
        InputError: if the folder exists.
        RunLockedError: if another process is packing to it.
        DataError: if more than the share ``max_bad`` of the rows is bad.
        DiskFullError: if there is no room.

    """
    work, rows = folder.with_name(f".{folder.name}.packing"), len(source)
    if folder.exists():
        tidy(work)
        raise InputError(f"{folder} exists. Choose another folder, or remove it first")
    settings = {"source": source.settings.model_dump(mode="json"), "max_side": max_side, "vlmix": __version__}
    with storage_errors(folder), run_lock(work):
        job = PackJob(
            work, {**settings, "shard_bytes": shard_bytes, "rows": rows, "files": seen_files(source)}
        )
        ledger = job.begin(max_bad)
        what = f"packing, going on behind row {job.row}" if job.row else "packing"
        try:
            with ShardWriter(job, ledger, shard_bytes) as shards:
                for done in each_row(PackRow(source, max_side), rows, workers, job.row):
                    shards.take(done, source.settings.kind)
                    told(what, done.index + 1, rows)
            counts = {"read": ledger.read, "used": ledger.used, "quarantined": ledger.quarantined}
            write_json(
                job.shards / INFO, {"schema": SCHEMA, "shards": shards.count, "rows": counts, **settings}
            )
            write_manifest(job.shards, SCHEMA)
            settle(job.shards, folder)
            job.end()
        except BaseException:
            job.leave()
            raise
    ledger.path = folder / FILE_NAME
    return ledger


def _as_json(sample: Sample) -> bytes:
    row = json.dumps(packed(sample), ensure_ascii=False, allow_nan=False).encode()
    if len(row) > MAX_ROW_BYTES:
        raise SampleError(f"the row has {len(row)} bytes, more than {MAX_ROW_BYTES}")
    return row
