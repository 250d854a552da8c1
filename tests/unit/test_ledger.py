"""The ledger: the equation, each bad row once, the limit, and going on after a stop."""

import io
import json

import pytest
from PIL import Image

from vlmix.core.errors import DataError, SampleError
from vlmix.core.interfaces import Source
from vlmix.core.sample import ImageRef, Sample, Turn
from vlmix.core.settings import PartSettings
from vlmix.data.ledger import Ledger, check


class Rows(Source):
    """Rows of which those in ``bad`` cannot be read, and those in ``torn`` have a damaged picture."""

    settings_class = PartSettings

    def __init__(self, size, bad=(), torn=()):
        super().__init__(None)
        self.size, self.bad, self.torn = size, set(bad), set(torn)
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
        self.picture = buffer.getvalue()

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index in self.bad:
            raise SampleError("no such thing", line=self.line(index), sample_id=f"r{index}")
        raw = self.picture[:-30] if index in self.torn else self.picture
        user = Turn("user", (ImageRef(raw), "what?"))
        return Sample(f"r{index}", (user, Turn("assistant", ("this",))))

    def line(self, index):
        return 10 * index

    @classmethod
    def tiny(cls, folder):
        raise NotImplementedError


def take_all(ledger, source):
    return [ledger.take("mine", source, index) for index in range(len(source))]


def written(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_epoch_counts_but_each_bad_row_is_written_once(tmp_path):
    path = tmp_path / "run" / "quarantine.jsonl"
    source, ledger = Rows(20, bad={3, 7}, torn={11}), Ledger(path)
    for epoch in range(1, 4):
        taken = take_all(ledger, source)
        assert [i for i, sample in enumerate(taken) if sample is None] == [3, 7, 11]
        assert (ledger.read, ledger.used, ledger.quarantined) == (20 * epoch, 17 * epoch, 3 * epoch)
    rows = written(path)
    assert [(r["source"], r["row"], r["line"], r["id"]) for r in rows] == [
        ("mine", 3, 30, "r3"),
        ("mine", 7, 70, "r7"),
        ("mine", 11, 110, "r11"),
    ]
    assert rows[0]["reason"] == "no such thing"
    assert "damaged PNG" in rows[2]["reason"]


def test_pictures_come_decoded():
    sample = Ledger(None).take("mine", Rows(1), 0)
    picture = sample.images[0].source
    assert isinstance(picture, Image.Image)
    assert sample.images[0].open() is picture


def test_too_large_a_bad_share_stops_with_numbers_limit_file_and_remedy(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    source, ledger = Rows(1000, bad=range(100, 140)), Ledger(path, max_bad=0.05, allowance=4)
    with pytest.raises(DataError) as caught:
        take_all(ledger, source)
    assert (ledger.read, ledger.quarantined) == (106, 6)
    for part in ("6 of 106", "5.00%", "more than 4", str(path), "raise max_bad"):
        assert part in str(caught.value)
    assert len(written(path)) == 6


def test_a_small_share_of_a_large_set_and_a_few_rows_of_a_small_set_are_borne():
    large = Ledger(None)
    for index in range(3000):
        large.take("mine", Rows(3000, bad=range(0, 3000, 150)), index)
    small = Ledger(None)
    for _ in range(9):
        for index in range(20):
            small.take("mine", Rows(20, bad={1, 2, 3, 4}), index)
    assert (large.quarantined, small.quarantined) == (20, 36)


def test_a_resumed_ledger_equals_one_that_never_stopped(tmp_path):
    source = Rows(40, bad={5, 15, 25, 35})
    whole, first = Ledger(tmp_path / "whole.jsonl"), Ledger(tmp_path / "parts.jsonl")
    for index in range(40):
        whole.take("mine", source, index)
    for index in range(20):
        first.take("mine", source, index)
    state = json.loads(json.dumps(first.to_dict()))
    for index in range(20, 30):  # read after the checkpoint, then lost: row 25 is met twice
        first.take("mine", source, index)
    with first.path.open("a") as file:
        file.write('{"source": "mine", "ro')  # killed while writing
    second = Ledger.from_dict(first.path, state)
    for index in range(20, 40):
        second.take("mine", source, index)
    assert second.to_dict() == whole.to_dict()
    assert first.path.read_text() == whole.path.read_text()


def test_check_reads_everything_however_bad():
    summary = check("mine", Rows(50, bad=range(40)))
    assert (summary.read, summary.used, summary.quarantined, len(summary.bad)) == (50, 10, 40, 40)
