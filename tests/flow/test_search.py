"""A real search over micro encoders: killed and taken up without repeating a trial; processes; a report."""

import json
import os
import signal
import sys
import time
from html.parser import HTMLParser

import pytest
import torch
import yaml
from transformers import LlamaForCausalLM, SiglipVisionModel

from tests.runs import LANGUAGE, synth
from vlmix.cli.search import search
from vlmix.core.errors import InputError, RecipeError
from vlmix.search import load_grid, run
from vlmix.search.trial import run_trial

pytestmark = pytest.mark.flow
# What a search imports when it needs it is here before the child that is killed is forked.
IMPORTED = (run_trial, LlamaForCausalLM, SiglipVisionModel)

EYE = {"kind": "siglip", "image_size": 48, "patch_size": 24, "width": 8, "layers": 1, "heads": 2, "mlp": 16}
COLOUR = synth("colour", size=8)
BASE = {
    "name": "micro",
    "model": {
        "image_size": 48,
        "encoders": [EYE],
        "fusion": {"kind": "channel_concat"},
        "projector": {"kind": "linear"},
        "language_model": {**LANGUAGE, "num_hidden_layers": 1, "max_position_embeddings": 128},
        "tokenizer": {"train": {"vocab_size": 300, "samples": 4}},
        "chat_template": "chatml",
        "max_length": 64,
    },
    "stages": [
        {"name": "join", "train": {"projector.*": 1e-2}, "data": [COLOUR], "batch_size": 4, "epochs": 1,
         "save_every_steps": 1}
    ],
    "evals": [{"benchmark": {"kind": "synth_qa", "size": 12, "image_size": 48, "tasks": ["colour"]}}],
}  # fmt: skip
GRID = {
    "name": "micro <b>&",
    "recipe": "base.yaml",
    "strategy": {"kind": "exhaustive", "always": ["eye"], "most": 2},
    "objective": "synth_qa.accuracy - cost.tokens / 1000",
    "verify": 1,
    "encoders": {"eye": EYE, "wide": {**EYE, "width": 12}},
    "start": {
        "stages": [{"name": "look", "train": {"*": 1e-2}, "data": [COLOUR], "batch_size": 4, "steps": 1}]
    },
    "align": {
        "skip": ["wide"],
        "stage": {
            "solo": {"projector": {"kind": "linear"}}, "train": {"encoder.*": 1e-2, "projector.*": 1e-2},
            "data": [COLOUR], "batch_size": 4, "steps": 2, "save_every_steps": 1,
        },
    },
}  # fmt: skip


def written(folder, **changes):
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE, sort_keys=False), encoding="utf-8")
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({**GRID, **changes}, sort_keys=False), encoding="utf-8")
    return path


def steps_of(trial):
    path = trial / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line)["global_step"] for line in lines if line.endswith("\n")]


def kill_in_second_trial(grid, out):
    """Start the search in a child and kill it while its second trial trains."""
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        try:
            run(grid, out)
        finally:
            os._exit(1)
    ledger = out / "ledger.jsonl"
    while not (ledger.exists() and any(len(steps_of(t)) in {1, 2} for t in (out / "trials").iterdir())):
        assert os.waitpid(pid, os.WNOHANG)[0] == 0, "the search ended by itself"
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


class Page(HTMLParser):
    """Which tags a page has, and what they point at."""

    def __init__(self):
        super().__init__()
        self.tags, self.links = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in {"src", "href"}]


def test_killed_in_the_middle_it_goes_on_and_repeats_no_finished_trial(tmp_path, capsys):
    grid, out = written(tmp_path), tmp_path / "out"
    kill_in_second_trial(grid, out)
    (first,) = (out / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    before = {
        path: path.stat().st_mtime_ns for path in (out / "trials" / json.loads(first)["key"]).rglob("*")
    }
    (cut,) = [trial for trial in (out / "trials").iterdir() if not (trial / "trial.json").exists()]
    (out / "ledger.jsonl").write_bytes(first + b'{"schema": "vlmix.sea')  # as a crash may leave it
    summary = run(grid, out, jobs=2)
    lines = (out / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    assert lines[0] == first
    entries = {json.loads(line)["key"]: json.loads(line) for line in lines}
    assert len(entries) == len(lines) == len(summary.rows) == 2
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert steps_of(cut) == sorted({*steps_of(cut)})
    assert not list((out / "trials").glob("*/checkpoints"))
    # The eye was aligned once, and others took it; what the frozen eyes saw was kept as well.
    aligned = [name for entry in entries.values() for name in entry["made"] if name.startswith("aligned")]
    assert len(aligned) == 1
    assert sum(name in entry["used"] for entry in entries.values() for name in aligned) == 1
    assert summary.cost.naive > summary.cost.reuse > summary.cost.start > 0
    assert all(check.same for check in summary.checks)
    assert len(summary.checks) == 1
    told = json.loads((out / "search.json").read_text())
    assert told["best"]["trials"] == list(summary.best.keys)
    assert [len(choice["seeds"]) for choice in told["choices"]] == [1, 1]
    html = (out / "search.html").read_text()
    page = Page()
    page.feed(html)
    assert "micro &lt;b&gt;&amp;" in html
    assert not {"script", "b", "link"} & {*page.tags}
    assert page.links
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "eye + wide" in (out / "search.md").read_text()
    (out / "search.html").unlink()
    search(str(grid), None, out)
    again = capsys.readouterr()
    assert "nothing was left to train: all 2 trials were done" in again.err
    assert f"best    {summary.found.best.label}" in again.out
    assert (out / "search.html").read_text() == html
    assert (out / "ledger.jsonl").read_bytes() == b"".join(lines)


def test_a_choice_that_cannot_be_built_is_told_and_passed_over(tmp_path):
    changes = {"encoders": {}, "start": None, "align": None, "verify": 0, "strategy": {"kind": "grid"}}
    axes = {"model.encoders.0": [{**EYE, "kind": "clip", "patch_size": 25}, EYE]}
    summary = run(written(tmp_path, axes=axes, **changes), tmp_path / "out")
    assert "multiple" in summary.rows[0].error
    assert summary.found.best == summary.rows[1].point
    assert summary.rows[0].error.splitlines()[0] in (tmp_path / "out/search.md").read_text()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"strategy": {"kind": "exhaustve"}}, "Did you mean 'exhaustive'"),
        ({"strategy": {"kind": "exhaustive", "alwys": []}}, "Did you mean 'always'"),
        ({"strategy": {"kind": "exhaustive", "always": ["ey"]}}, "Did you mean 'eye'"),
        ({"objective": "synth_qa.accuracy; 1"}, "is not a formula"),
        ({"objective": "nlvr.accuracy"}, "no figure of a benchmark"),
        ({"recipe": "bse.yaml"}, "no such recipe file"),
        ({"encoders": {**GRID["encoders"], "wide": {**EYE, "widht": 3}}}, "Did you mean 'width'"),
        ({"encoders": {**GRID["encoders"], "wide": {**EYE, "kind": "clip", "patch_size": 25}}}, "multiple"),
        ({"align": {"stage": {"solo": {"projector": {"kind": "linear"}}}}}, "this key is required"),
    ],
)
def test_a_mistake_is_named_before_anything_is_written(tmp_path, changes, says):
    with pytest.raises(InputError) as error:
        run(written(tmp_path, **changes), tmp_path / "out")
    assert says in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_search_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r"holds thesis.tex and is no search"):
        run(written(tmp_path), tmp_path / "out")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"--executor ray needs the extra `ray`: pip install 'vlmix\[ray\]'"):
        run(written(tmp_path), tmp_path / "new", executor="ray")
    assert not (tmp_path / "new").exists()
    with pytest.raises(RecipeError, match="no such grid file"):
        load_grid(tmp_path / "none.yaml")
