"""Packing that is killed again and again goes on behind its finished shards, and gives the same bytes."""

import json
import os
import random
import signal
import time

import pytest
from PIL import Image

from tests.flow.test_data_commands import source_of
from vlmix.core.errors import DataError, InputError, RunLockedError
from vlmix.core.files import run_lock, verify_manifest
from vlmix.data import pack_job
from vlmix.data.ledger import Ledger
from vlmix.data.pack import pack
from vlmix.data.pack_job import PackJob

pytestmark = pytest.mark.flow
ROWS = 150


@pytest.fixture
def rows(tmp_path):
    """Rows with a picture each; every eleventh is bad."""
    folder = tmp_path / "rows"
    folder.mkdir()
    listed = []
    for number in range(ROWS):
        Image.effect_noise((24, 20), 80).convert("RGB").save(folder / f"{number}.png")
        name = "absent.png" if number % 11 == 7 else f"{number}.png"
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"thing {number}"}]
        listed.append({"id": str(number), "image": name, "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(listed))
    return folder / "rows.json"


def packing(rows, folder, **more):
    return pack(
        source_of("llava_json", path=str(rows)), folder, shard_bytes=20_000, **{"max_bad": 1.0, **more}
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def killed(rows, folder, shards, seconds):
    """Whether a process that packs was killed so long after it began its next ``shards``-th shard."""
    work = folder.with_name(f".{folder.name}.packing") / "shards"
    wanted = len([*work.glob("*.tar")]) + shards
    pid = os.fork()
    if pid == 0:
        packing(rows, folder)
        os._exit(0)
    while len([*work.glob("*.tar")]) < wanted:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        time.sleep(0.0005)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status) != 0


def row_noted(work):
    note = work / "progress.json"
    return json.loads(note.read_text())["row"] if note.is_file() else 0


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_kills_cost_no_finished_shard_and_change_no_byte(rows, tmp_path):
    ledger = packing(rows, tmp_path / "whole")
    chance, work = random.Random(3), tmp_path / ".shards.packing"
    assert (ledger.used, ledger.quarantined) == (ROWS - 13, 13)
    kept = [0]
    while killed(rows, tmp_path / "shards", chance.randint(1, 3), chance.uniform(0, 0.01)):
        assert not (tmp_path / "shards").exists()
        kept.append(row_noted(work))
    assert kept == sorted(kept)
    assert len({*kept}) >= 4
    if not (tmp_path / "shards").exists():
        packing(rows, tmp_path / "shards")
    assert contents(tmp_path / "shards") == contents(tmp_path / "whole")
    verify_manifest(tmp_path / "shards", "vlmix.shards/1")
    with pytest.raises(InputError, match="exists"):  # one that was killed behind its last step left a note
        packing(rows, tmp_path / "shards")
    assert not work.exists()


def stopped_at(monkeypatch, number):
    """A packing that a signal ends when it notes its ``number``-th shard."""
    noted = PackJob.note

    def note(self, row, ledger):
        noted(self, row, ledger)
        if len(self.finished) == number:
            raise KeyboardInterrupt

    monkeypatch.setattr(PackJob, "note", note)


def left_over(rows, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stopped_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            packing(rows, tmp_path / "shards")
    return tmp_path / ".shards.packing"


def first_row(rows, tmp_path):
    """The row at which packing begins."""
    seen = []
    packing(rows, tmp_path / "shards", told=lambda what, done, total: seen.append(done))
    return seen[0] - 1


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_stopped_packing_goes_on(rows, tmp_path, monkeypatch, workers):
    packing(rows, tmp_path / "whole")
    work = left_over(rows, tmp_path, monkeypatch)
    assert row_noted(work) > 10
    packing(rows, tmp_path / "shards", workers=workers)
    assert contents(tmp_path / "shards") == contents(tmp_path / "whole")


@pytest.mark.parametrize("harm", ["shard", "note", "rows", "lines"])
def test_what_is_left_counts_only_if_it_is_whole_and_of_the_same_rows(rows, tmp_path, monkeypatch, harm):
    work = left_over(rows, tmp_path, monkeypatch)
    if harm == "shard":
        (work / "shards/000001.tar").write_bytes(b"short")
    elif harm == "note":
        (work / "progress.json").write_text("{")
    elif harm == "lines":
        (work / "shards/quarantine.jsonl").write_text("")
    else:
        rows.write_text(rows.read_text().replace("thing 2", "thong 2"))
    assert first_row(rows, tmp_path) == 0
    packing(rows, tmp_path / "whole")
    assert contents(tmp_path / "shards") == contents(tmp_path / "whole")


def test_two_packings_to_one_place_do_not_mix(rows, tmp_path):
    with run_lock(tmp_path / ".shards.packing"), pytest.raises(RunLockedError, match="in use by process"):
        packing(rows, tmp_path / "shards")


def test_too_many_bad_rows_are_raised_and_a_larger_share_goes_on(rows, tmp_path):
    with pytest.raises(DataError, match="rows read are bad"):
        packing(rows, tmp_path / "shards", max_bad=0.01)
    assert first_row(rows, tmp_path) > 0
    assert len(contents(tmp_path / "shards")["quarantine.jsonl"].splitlines()) == 13


def test_what_was_written_after_the_last_shard_is_taken_back(tmp_path):
    ledger = Ledger(tmp_path / "quarantine.jsonl", max_bad=1.0)
    job = PackJob(tmp_path, {})
    job.shards.mkdir()
    pack_job.shard_path(job.shards, 0).write_bytes(b"whole")
    job.note(3, ledger)
    (job.shards / "quarantine.jsonl").write_text("a line of a row that comes again\n")
    (job.shards / ".packed.json.1.unfinished").write_text("{")
    again = PackJob(tmp_path, {})
    again.begin(1.0)
    assert (again.row, (job.shards / "quarantine.jsonl").read_text()) == (3, "")
    assert sorted(path.name for path in job.shards.iterdir()) == ["000000.tar", "quarantine.jsonl"]
