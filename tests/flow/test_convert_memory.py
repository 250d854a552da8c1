"""Converting holds a shard of the weights at most, however large the checkpoint."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests import layouts
from tests.layouts import decoder, llava, mini_gemini
from vlmix.convert.export import export
from vlmix.convert.run import convert
from vlmix.core import pickles
from vlmix.core.pickles import as_safetensors

pytestmark = pytest.mark.flow

SHARD = 6 << 20
SLACK = 5 << 20  # the allocator's own, and what a conversion needs besides weights
ROOMY = {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 10, "num_key_value_heads": 4}


class Watch(threading.Thread):
    """Looks at the process's memory every millisecond."""

    def __init__(self):
        super().__init__(daemon=True)
        self.first = self.most = memory()
        self.done = threading.Event()

    def run(self):
        while not self.done.is_set():
            self.most = max(self.most, memory())
            time.sleep(0.001)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.join()

    @property
    def growth(self):
        return self.most - self.first


def memory():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A checkpoint of more than ten shards."""
    monkeypatch.setattr("vlmix.convert._shards.SHARD_BYTES", SHARD)
    monkeypatch.setattr(layouts, "WIDTH", ROOMY["hidden_size"])
    monkeypatch.setattr(layouts, "SIZES", {**layouts.SIZES, **ROOMY})
    folder = llava("llama", tmp_path / "hub", tmp_path)
    assert (folder / "model.safetensors").stat().st_size > 10 * SHARD
    return folder


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads memory from Linux's /proc")
def test_no_more_than_a_shard_is_held(large, tmp_path, monkeypatch):
    convert(large, tmp_path / "warm")  # what libraries load once is no part of it
    with Watch() as reading:
        convert(large, tmp_path / "ours")
    with Watch() as writing:
        export(tmp_path / "ours", tmp_path / "back", "llava")
    whole = sum(path.stat().st_size for path in (tmp_path / "ours").glob("model-*.safetensors"))
    assert whole > 10 * SHARD
    assert reading.growth < SHARD + SLACK
    assert writing.growth < SHARD + SLACK
    monkeypatch.setattr("vlmix.convert._shards.SHARD_BYTES", 8 * SHARD)
    with Watch() as control:
        convert(large, tmp_path / "other")
    assert control.growth > 6 * SHARD  # what is held is seen


def test_a_pickle_is_copied_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "PART_BYTES", 1 << 20)
    tensors = {f"layer.{i}.weight": torch.full((64, 1024), float(i)) for i in range(16)}
    tied = {**tensors, "tied": tensors["layer.0.weight"], "turned": tensors["layer.1.weight"].T}
    for zipped in (True, False):  # files of torch before 1.6 are no zip archives
        torch.save(tied, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
        copies = as_safetensors(tmp_path / "x.bin", tmp_path)
        assert len(copies) >= 4
        assert all(path.stat().st_size < 1.1 * (1 << 20) for path in copies)
        found = {}
        for path in copies:
            with safe_open(path, framework="pt") as file:
                found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert found.keys() == tied.keys()
        assert all(torch.equal(found[name], tied[name]) for name in found)


def test_progress_is_told_in_bytes(tmp_path):
    said = []
    published = mini_gemini("mixtral", tmp_path / "hub", tmp_path, model=decoder("mixtral"))
    convert(published, tmp_path / "ours", told=lambda *news: said.append(news))
    export(tmp_path / "ours", tmp_path / "back", "mini_gemini", told=lambda *news: said.append(news))
    ends = [news for news in said if news[1] == news[2]]
    assert [what for what, *_ in ends] == ["writing", "writing"]
    assert len(said) > 100
    torch.save(load_file(published / "model.safetensors"), published / "pytorch_model.bin")
    (published / "model.safetensors").unlink()
    convert(published, tmp_path / "again", told=lambda *news: said.append(news))
    assert any(what.startswith("reading pytorch_model.bin, a pickle") for what, *_ in said)
