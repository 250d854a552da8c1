"""Writing that survives a crash: every file and folder appears whole, or the old one stays.

A file is written under a temporary name, forced to disk and renamed. A folder is filled beside its final
place and renamed into it. A manifest lists what a folder holds, so that a reader can tell a whole folder
from a damaged one. One lock file says who owns a run folder.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

from vlmix.core.errors import CheckpointError, DiskFullError, InputError, RunLockedError

MANIFEST = "manifest.json"
LOCK = "run.lock"
_UNFINISHED = ".unfinished"
_ASIDE = ".aside" + _UNFINISHED
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
_STORAGE_FAULTS = {*_NO_ROOM, errno.EROFS, errno.EACCES, errno.EPERM}
_STORAGE_WORDS = ("No space left on device", *(f"(os error {code})" for code in _STORAGE_FAULTS))
_AT_CWD, _EXCHANGE = -100, 2  # Linux: AT_FDCWD, RENAME_EXCHANGE


class storage_errors:  # noqa: N801 - used as a `with` block, like contextlib's own
    """Turn a full, failing or forbidden disk into a `DiskFullError` naming ``path``, whoever reported it.

    Libraries report a full disk in their own ways (`OSError`, `RuntimeError`, safetensors' own class), so
    errno, chained causes and the system's wording are all looked at. Other errors pass unchanged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        """Do nothing; the work is at the end."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raise `DiskFullError` where the error comes from the disk."""
        if isinstance(error, Exception) and not isinstance(error, DiskFullError) and _is_storage_fault(error):
            raise DiskFullError(
                f"cannot save {self.path}: {error}. What was saved before is intact; free some space, "
                "or make the folder writable again, and continue with --resume"
            ) from error


def _is_storage_fault(error: BaseException) -> bool:
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _STORAGE_FAULTS:
            return True
        if any(words in str(seen) for words in _STORAGE_WORDS):
            return True
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return False


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``path`` whole or not at all, and force it to disk.

    Raises:
        DiskFullError: if there is no room; a file that was there before is unchanged.

    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex}{_UNFINISHED}")
    with storage_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys, whole or not at all; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file of our own.

    Raises:
        InputError: if it is missing or not JSON; names the file and line.

    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, schema: str, parent: str = "") -> None:
    """List every file of ``folder`` with its SHA-256 and size in bytes in ``manifest.json``.

    ``schema`` names the kind and version of the folder; ``parent`` is the digest of the manifest it follows.
    """
    files = {
        path.relative_to(folder).as_posix(): {"sha256": sha256(path), "size": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST
    }
    write_json(folder / MANIFEST, {"schema": schema, "parent": parent, "files": files})


def verify_manifest(folder: Path, schema: str | None = None) -> Mapping[str, Any]:
    """Check every file that ``manifest.json`` lists, and return the manifest; ``None`` allows any schema.

    Raises:
        CheckpointError: if the manifest is absent or of another schema, or a file is missing or changed.

    """
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder} has no {MANIFEST}: it is not a finished vlmix folder")
    try:
        manifest = read_json(folder / MANIFEST)
        found, files = manifest["schema"], dict(manifest["files"])
        for name, entry in files.items():
            _verify_file(folder / name, entry["size"], entry["sha256"])
    except CheckpointError:
        raise
    except (InputError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is damaged: {error}") from None
    if schema is not None and found != schema:
        raise CheckpointError(f"{folder} is a {found!r}, not a {schema!r}")
    return manifest


def _verify_file(path: Path, size: int, digest: str) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing although the manifest lists it")
    if (actual := path.stat().st_size) != size:
        raise CheckpointError(f"{path} has {actual} bytes, its manifest says {size}")
    if sha256(path) != digest:
        raise CheckpointError(f"{path} was changed or damaged: its SHA-256 is not the manifest's")


@contextmanager
def publish(folder: Path) -> Generator[Path]:
    """Give an empty folder to fill; when the block ends well it becomes ``folder`` in one step.

    Everything in it is forced to disk first. A folder already there is replaced; if the block fails, or
    the process dies at any moment, it stays as it was. (Where the system cannot exchange two folders in
    one step, a process that dies between two renames leaves the old one aside; `recover` puts it back.)

    Raises:
        DiskFullError: if there is no room.

    """
    temporary = folder.with_name(f".{folder.name}.{uuid4().hex}{_UNFINISHED}")
    with storage_errors(folder):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            settle(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def settle(new: Path, folder: Path) -> None:
    """Force a folder to disk and give it its name in one step; one already there ends up under ``new``'s."""
    _sync_tree(new)
    _replace_folder(new, folder)
    _sync_folder(folder.parent)


def discard(folder: Path) -> None:
    """Delete a folder; a process that dies meanwhile leaves nothing that looks whole."""
    doomed = folder.with_name(f".{folder.name}.{uuid4().hex}{_UNFINISHED}")
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def recover(parent: Path, name: str = "") -> None:
    """Undo what writers that were killed left half done under ``parent``; for the owner of the lock only.

    With ``name`` only what was to be so called.
    """
    prefix = f".{escape(name)}." if name else "."
    for path in parent.glob(f"{prefix}*{_ASIDE.removeprefix('.') if name else _ASIDE}"):
        folder = path.with_name(path.name.removeprefix(".").removesuffix(_ASIDE))
        if not folder.exists():
            path.rename(folder)
    for path in parent.glob(f"{prefix}*{_UNFINISHED}"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def run_lock(folder: Path) -> Generator[None]:
    """Own ``folder`` for the length of the block; made if absent, and removed again if it stays empty.

    The system frees the lock when its owner dies, however it dies, so a lock left behind never blocks.

    Raises:
        InputError: if no folder can be made or written there.
        DiskFullError: if there is no room.
        RunLockedError: if another process owns it; names that process and machine.

    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(folder / LOCK)
    except OSError as error:
        with storage_errors(folder):
            if error.errno in _NO_ROOM:
                raise
        raise InputError(f"{folder} cannot be used as a folder: {error.strerror}. Choose another") from None
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        if folder.is_dir() and [path.name for path in folder.iterdir()] == [LOCK]:
            (folder / LOCK).unlink()
            folder.rmdir()
        os.close(descriptor)


def _acquire(path: Path) -> int:
    """Open and lock the file; opened anew if its last owner removed it in between."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 4096).decode("utf-8", "replace").strip() or "another process"
            os.close(descriptor)
            raise RunLockedError(
                f"{path.parent} is in use by {owner}: wait for it to end, or choose another --out"
            ) from None
        if path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor)):
            return descriptor
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            _sync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace_folder(new: Path, folder: Path) -> None:
    """Rename ``new`` to ``folder``; a folder already there ends up under the name of ``new``."""
    if not folder.exists():
        new.rename(folder)
    elif not _exchange(new, folder):
        aside = new.with_name(f".{folder.name}{_ASIDE}")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            folder.rename(aside)
            new.rename(folder)
        finally:
            if not folder.exists():
                aside.rename(folder)
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step; False where this system or file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True)["renameat2"]
    except AttributeError:
        return False
    result: int = rename(_AT_CWD, os.fsencode(a), _AT_CWD, os.fsencode(b), _EXCHANGE)
    return result == 0
