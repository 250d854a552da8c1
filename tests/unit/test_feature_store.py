"""The files of features: whole or absent, within their limit, shared by processes, harmless to others."""

import hashlib
import multiprocessing
import os
import shutil

import pytest
import torch
from safetensors import safe_open

from vlmix.train import feature_store
from vlmix.train.feature_store import FeatureStore, place, read_tensors

ENCODER = "0" * 32
TENSORS = [torch.randn(1, 50, 8), torch.randn(1, 4, 8).bfloat16()]
SIZE = 2200  # bytes of a file of these, at most


def key(number):
    return hashlib.sha256(str(number).encode()).hexdigest()


def store(folder, limit=100 * SIZE, **more):
    told = []
    return FeatureStore(folder, limit, told.append, **more), told


def written(folder):
    return {n for n in range(100) if place(folder, ENCODER, key(n)).is_file()}


def used_before(folder, numbers):
    """As if these had been used long ago, the first the longest."""
    for age, number in enumerate(numbers):
        os.utime(place(folder, ENCODER, key(number)), (1e9 + age, 1e9 + age))


def test_what_was_written_is_read_and_any_damage_makes_it_absent(tmp_path):
    kept, _ = store(tmp_path)
    kept.write(ENCODER, key(0), TENSORS)
    path = place(tmp_path, ENCODER, key(0))
    found = read_tensors(path, key(0))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, TENSORS, strict=True))
    with safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor("0"), TENSORS[0])
    whole = path.read_bytes()
    assert len(whole) < SIZE
    assert read_tensors(path, key(1)) is None
    for cut in (0, 4, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert read_tensors(path, key(0)) is None
    for at in range(0, len(whole), 97):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 64]) + whole[at + 1 :])
        found = read_tensors(path, key(0))
        assert found is None or all(torch.equal(a, b) for a, b in zip(found, TENSORS, strict=True))
    path.unlink()
    assert read_tensors(path, key(0)) is None


def test_the_oldest_used_go_first_and_nothing_of_this_run(tmp_path):
    first, _ = store(tmp_path)
    for number in range(10):
        first.write(ENCODER, key(number), TENSORS)
    used_before(tmp_path, range(9, -1, -1))
    foreign = [tmp_path / "mine.safetensors", tmp_path / ENCODER / "ab" / "notes.txt"]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_text("keep")
    assert read_tensors(place(tmp_path, ENCODER, key(9)), key(9))  # the oldest, but used just now
    second, told = store(tmp_path, limit=10 * SIZE)
    for number in range(10, 14):
        second.write(ENCODER, key(number), TENSORS)
        assert second.size() <= second.limit
    assert {9, 10, 11, 12, 13} <= written(tmp_path)
    assert {8, 7, 6}.isdisjoint(written(tmp_path))
    for number in range(14, 40):
        second.write(ENCODER, key(number), TENSORS)
    assert second.size() <= second.limit
    assert {10, 11, 12, 13} <= written(tmp_path)
    assert len(told) == 1
    assert "full" in told[0]
    assert all(path.read_text() == "keep" for path in foreign)


def test_room_is_left_on_the_disk_and_a_folder_that_refuses_ends_storing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        feature_store.shutil, "disk_usage", lambda path: usage._replace(free=usage.total // 25)
    )
    kept, told = store(tmp_path)
    kept.write(ENCODER, key(0), TENSORS)
    assert not written(tmp_path)
    assert len(told) == 1
    monkeypatch.undo()
    (tmp_path / "file").touch()
    kept, told = store(tmp_path / "file")
    for number in range(3):
        kept.write(ENCODER, key(number), TENSORS)
    assert len(told) == 1
    assert "Not a directory" in told[0] or "File exists" in told[0]


def _write_all(folder):
    torch.set_num_threads(1)
    kept, _ = store(folder, limit=12 * SIZE, writers=3)
    for number in range(30):
        kept.write(ENCODER, key(number), [torch.full_like(tensor, number) for tensor in TENSORS])


def test_processes_that_write_the_same_keys_leave_whole_files_within_the_limit(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_all, args=(tmp_path,)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert written(tmp_path)
    for number in written(tmp_path):
        found = read_tensors(place(tmp_path, ENCODER, key(number)), key(number))
        assert found is not None
        assert all((tensor == number).all() for tensor in found)
    assert store(tmp_path)[0].size() <= 15 * SIZE  # three writers may each be one file past their count
    assert not list(tmp_path.rglob("*.unfinished"))


@pytest.mark.parametrize("hours", [0, 2])
def test_what_a_killed_writer_left_goes_after_an_hour(tmp_path, hours):
    kept, _ = store(tmp_path)
    kept.write(ENCODER, key(0), TENSORS)
    left = place(tmp_path, ENCODER, key(0)).with_name(f"{key(0)[2:]}.{'a' * 32}.unfinished")
    left.write_bytes(b"half")
    when = left.stat().st_mtime - hours * 3600
    os.utime(left, (when, when))
    kept.size()
    assert left.exists() == (hours == 0)
