"""Files and folders appear whole or not at all, and a run folder has one owner."""

import contextlib
import errno
import json
import multiprocessing
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from vlmix.core import files
from vlmix.core.errors import CheckpointError, DiskFullError, InputError, RunLockedError, VlmixError

SCHEMA = "test/1"
FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


def save(folder: Path, text: str) -> None:
    with files.publish(folder) as new:
        files.write_text(new / "a.txt", text)
        (new / "deep").mkdir()
        files.write_json(new / "deep" / "b.json", {"b": text})
        files.write_manifest(new, SCHEMA)


def content(folder: Path) -> str:
    files.verify_manifest(folder, SCHEMA)
    text = (folder / "a.txt").read_text()
    assert files.read_json(folder / "deep" / "b.json") == {"b": text}
    return text


class Trap:
    """Raises before or after the chosen disk call; a killed process makes no call after that one."""

    CALLS = ("fsync", "open", "mkdir", "rename", "replace", "unlink", "rmdir")

    def __init__(self, monkeypatch, at, error, after=False):
        self.seen, self.at, self.error, self.after = 0, at, error, after
        for name in self.CALLS:
            self._wrap(monkeypatch, os, name)
        self._wrap(monkeypatch, files, "_exchange")

    def _wrap(self, monkeypatch, owner, name):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            self.seen += 1
            hit = self.seen == self.at
            dead = isinstance(self.error, Killed) and 0 < self.at < self.seen
            if dead or (hit and not self.after):
                raise self.error
            result = real(*args, **kwargs)
            if hit:
                raise self.error
            return result

        monkeypatch.setattr(owner, name, call)


def steps_of_a_save(tmp_path: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        trap = Trap(patch, at=0, error=Killed())
        save(tmp_path / "count", "old")
        save(tmp_path / "count", "new")
    assert trap.seen >= 20
    return trap.seen


@pytest.mark.slow
@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("error", [Killed(), FULL])
def test_a_save_that_fails_at_any_system_call_leaves_old_or_new(tmp_path, error, exchange):
    fired, outcomes = 0, set()
    for at in range(1, steps_of_a_save(tmp_path) + 1):
        for after in (False, True):
            folder = tmp_path / f"{at}{after}" / "model"
            save(folder, "old")
            with pytest.MonkeyPatch.context() as patch:
                if not exchange:
                    patch.setattr(files, "_exchange", lambda a, b: False)
                Trap(patch, at, error, after)
                with contextlib.suppress(Killed, DiskFullError):
                    save(folder, "new")
                    fired -= 1
                fired += 1
            if not exchange:
                files.recover(folder.parent)
            outcomes.add(content(folder))
            files.recover(folder.parent)
            assert [p.name for p in folder.parent.iterdir()] == ["model"]
    assert fired >= 20
    assert outcomes == {"old", "new"}


def test_the_harness_catches_a_naive_save(tmp_path):
    folder = tmp_path / "model"
    save(folder, "old")
    (folder / "a.txt").write_text("ne")
    with pytest.raises(CheckpointError, match=r"a\.txt"):
        content(folder)


def test_any_flipped_or_lost_byte_is_found(tmp_path):
    folder = tmp_path / "model"
    save(folder, "old")
    for path in [p for p in folder.rglob("*") if p.is_file() and p.name != files.MANIFEST]:
        whole = path.read_bytes()
        for damage in (whole[:-1], whole + b"x", bytes([whole[0] ^ 1]) + whole[1:], None):
            path.unlink() if damage is None else path.write_bytes(damage)
            with pytest.raises(CheckpointError, match=path.name):
                files.verify_manifest(folder, SCHEMA)
            path.write_bytes(whole)
    with pytest.raises(CheckpointError, match="other/1"):
        files.verify_manifest(folder, "other/1")
    for damage in ("{", "[]", '{"schema": "test/1"}', '{"schema": "test/1", "files": {"a.txt": 3}}'):
        (folder / files.MANIFEST).write_text(damage)
        with pytest.raises(CheckpointError, match="damaged"):
            files.verify_manifest(folder, SCHEMA)
    with pytest.raises(CheckpointError, match="not a finished"):
        files.verify_manifest(tmp_path, SCHEMA)


def test_a_failed_block_changes_nothing(tmp_path):
    folder = tmp_path / "model"
    save(folder, "old")
    with pytest.raises(ValueError, match="mine"), files.publish(folder):
        raise ValueError("mine")
    assert content(folder) == "old"
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
        *(OSError(code, os.strerror(code)) for code in FAULTS),
    ],
)
def test_a_full_disk_reported_by_a_library_is_recognised(tmp_path, error):
    if isinstance(error, RuntimeError):
        error.__context__ = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(DiskFullError, match="model"), files.publish(tmp_path / "model"):
        raise error
    with pytest.raises(RuntimeError, match="other"), files.storage_errors(tmp_path):
        raise RuntimeError("other")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_device_is_disk_full():
    with pytest.raises(DiskFullError), files.storage_errors(Path("x")):
        Path("/dev/full").write_bytes(b"x")


def test_json_is_sorted_strict_and_names_its_file(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, {"b": 1, "a": "é"})
    assert list(json.loads(path.read_text())) == ["a", "b"]
    assert "é" in path.read_text()
    with pytest.raises(ValueError, match="JSON compliant"):
        files.write_json(path, float("nan"))
    assert files.read_json(path) == {"a": "é", "b": 1}
    path.write_text('{\n"a": }')
    with pytest.raises(InputError, match=r"x\.json.*line 2"):
        files.read_json(path)
    with pytest.raises(InputError, match="No such file"):
        files.read_json(tmp_path / "missing")


def _hold(folder: str, ready, done) -> None:
    with files.run_lock(Path(folder)):
        ready.set()
        done.wait()


def test_one_owner_and_a_dead_owner_does_not_block(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    owner = context.Process(target=_hold, args=(str(tmp_path / "run"), ready, done))
    owner.start()
    assert ready.wait(120)
    with (
        pytest.raises(RunLockedError, match=f"process {owner.pid} on ") as caught,
        files.run_lock(tmp_path / "run"),
    ):
        pass
    assert caught.value.exit_code == 5
    owner.kill()
    owner.join()
    with files.run_lock(tmp_path / "run"):
        assert f"process {os.getpid()} " in (tmp_path / "run" / files.LOCK).read_text()


def test_a_run_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "taken").write_text("a file")
    for folder in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(InputError, match=r"taken.* cannot be used as a folder"), files.run_lock(folder):
            pass
    assert (tmp_path / "taken").read_text() == "a file"


@pytest.mark.parametrize("code", FAULTS)
def test_a_run_folder_that_takes_no_lock_is_said(tmp_path, monkeypatch, code):
    def refuse(path):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files, "_acquire", refuse)
    full = code in FAULTS[:4]
    with pytest.raises(VlmixError, match=str(tmp_path)) as caught, files.run_lock(tmp_path):
        pass
    assert caught.value.exit_code == (4 if full else 2)
