"""The data of a step is the same whoever prepares it: no workers, some, one rank or several."""

import math
import os
import signal
import time
from dataclasses import replace

import datasets
import pytest
import torch
from PIL import Image

from tests.runs import one_stage, recipe, synth, told, train
from vlmix.core.batching import BatchingSettings
from vlmix.core.errors import DataError, SampleError, VlmixError
from vlmix.core.images import encoded_image
from vlmix.core.sample import ImageRef, Sample, Turn
from vlmix.core.settings import PartSettings
from vlmix.data.ledger import Ledger
from vlmix.data.pack import pack
from vlmix.train.build import build_processor, open_source
from vlmix.train.loader import Loader
from vlmix.train.order import DataOrder, group_weights
from vlmix.train.reading import NamedSource, Parcel, SampleEncoder, StepReader

pytestmark = pytest.mark.flow


class MixedSettings(PartSettings):
    kind: str = "mixed"


class Mixed:
    """Rows of many lengths, a third of them without pictures; row 5 has no words, row 7 no picture."""

    def __init__(self, action=None):
        self.action, self.settings = action, MixedSettings()

    @classmethod
    def places(cls, settings):
        return []

    def __len__(self):
        return 24

    def line(self, index):
        return index + 1

    def __getitem__(self, index):
        if self.action and index == 3:
            self.action()
        if index == 5:
            raise SampleError("no words", sample_id="row 5")
        picture = b"no picture" if index == 7 else Image.new("RGB", (20, 20), (index * 9, 0, 0))
        shown = () if index % 3 == 0 else (ImageRef(picture),)
        answer = "word " * (1 + index % 5)
        turns = (Turn("user", (*shown, "q")), Turn("assistant", (answer,)))
        return Sample(f"row {index}", turns)


@pytest.fixture(scope="module")
def encoder():
    return SampleEncoder(build_processor(recipe())[0])


def reader(encoder, action=None, rank=0, world=1, batch_size=8, **batching):
    source = Mixed(action)
    order = DataOrder.plan([len(source)], [None], batch_size, (0, 0), steps=None, epochs=2)
    named = [NamedSource("mixed", source)]
    return StepReader(order, named, encoder, BatchingSettings(**batching), 3, rank, world)


def steps_of(read, workers=0, first=0):
    ledger = Ledger(None, max_bad=1)
    with Loader(read, workers=workers, timeout=60) as loader:
        data = [loader.step(step, ledger) for step in range(first, loader.steps)]
    return data, ledger


def same(left, right):
    if left is None or right is None:
        assert left is right
        return
    assert left.keys() == right.keys()
    assert all(
        torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left
    )


@pytest.mark.parametrize("batching", [{}, {"group": False}, {"window": 3}, {"tokens": 60}])
def test_workers_change_nothing(encoder, batching):
    alone, ledger = steps_of(reader(encoder, **batching))
    assert (ledger.used, ledger.quarantined) == (44, 4)
    for workers, first in ((1, 0), (2, 2)):
        others, _ = steps_of(reader(encoder, **batching), workers, first)
        for mine, theirs in zip(alone[first:], others, strict=True):
            assert mine.sample_ids == theirs.sample_ids
            assert (mine.tokens, mine.positions, mine.supervised_tokens, mine.pictured) == (
                theirs.tokens,
                theirs.positions,
                theirs.supervised_tokens,
                theirs.pictured,
            )
            for left, right in zip(mine.micro_batches, theirs.micro_batches, strict=True):
                same(left, right)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_micro_batches_of_one(encoder, world):
    alone = reader(encoder)
    ranks = [reader(encoder, rank=rank, world=world) for rank in range(world)]
    for step in range(alone.order.steps):
        whole, parts = alone[step], [each[step] for each in ranks]
        dealt = [batch for round_ in zip(*(p.micro_batches for p in parts), strict=True) for batch in round_]
        while dealt and dealt[-1] is None:
            dealt.pop()
        for left, right in zip(whole.micro_batches, dealt, strict=True):
            same(left, right)
        assert sorted(row.sample_id for p in parts for row in p.rows) == sorted(
            r.sample_id for r in whole.rows
        )
        assert sum(p.supervised_tokens for p in parts) == whole.supervised_tokens
        assert len({p.pictured for p in parts}) == 1


class Whole(Mixed):
    """The same rows without the two bad ones."""

    def __getitem__(self, index):
        return super().__getitem__(index + 24 if index in {5, 7} else index)


def stored(kind, folder):
    """Two sources of a kind that hold these rows, one of them half."""
    shards = folder / "shards"
    pack(Whole(), shards, shard_bytes=8000)
    if kind == "webdataset":
        return [open_source({"kind": kind, "shards": str(shards)}) for _ in range(2)]
    rows = [
        {
            "id": sample.id,
            "conversations": [
                {"from": "human", "value": "<image>" * len(sample.images) + sample.turns[0].text},
                {"from": "gpt", "value": sample.turns[1].text},
            ],
            "image": [{"bytes": encoded_image(image.source)[0], "path": None} for image in sample.images],
        }
        for sample in map(Whole().__getitem__, range(24))
    ]
    found = []
    for name, part in (("whole", rows), ("half", rows[::2])):
        datasets.Dataset.from_list(part).save_to_disk(str(folder / name))
        found.append(open_source({"kind": kind, "path": str(folder / name)}))
    return found


@pytest.mark.parametrize("batching", [{}, {"window": 3}, {"tokens": 60, "pack": True}])
@pytest.mark.parametrize("kind", ["webdataset", "hf_dataset"])
def test_stored_rows_go_on_at_any_step_with_any_workers_and_ranks(encoder, tmp_path, kind, batching):
    """From every step on, and on several ranks, a group-balanced mix is what one process reads throughout."""
    sources = stored(kind, tmp_path)
    sizes = [len(source) for source in sources]
    order = DataOrder.plan(sizes, group_weights(["a", "b"], sizes), 8, (3, 1), steps=None, epochs=1.5)
    named = [NamedSource(str(number), source) for number, source in enumerate(sources)]

    def read(rank=0, world=1):
        packs = replace(encoder, packed=batching.get("pack", False))
        return StepReader(order, named, packs, BatchingSettings(**batching), 3, rank, world)

    whole, ledger = steps_of(read())
    assert ledger.used == order.draws == math.ceil(1.5 * sum(sizes))
    for workers, first in ((1, 1), (2, order.steps - 2), (0, order.steps - 1)):
        rest, _ = steps_of(read(), workers, first)
        assert [step.sample_ids for step in rest] == [step.sample_ids for step in whole[first:]]
        for mine, theirs in zip(rest, whole[first:], strict=True):
            for left, right in zip(mine.micro_batches, theirs.micro_batches, strict=True):
                same(left, right)
    ranks = [steps_of(read(rank, 3), first=2)[0] for rank in range(3)]
    for number, step in enumerate(whole[2:]):
        dealt = zip(*(data[number].micro_batches for data in ranks), strict=True)
        batches = [batch for round_ in dealt for batch in round_ if batch is not None]
        assert len(batches) == len(step.micro_batches)
        for left, right in zip(step.micro_batches, batches, strict=True):
            same(left, right)


def test_a_parcel_is_what_was_put_in(encoder):
    prepared = reader(encoder)[0]
    assert prepared.micro_batches
    again = Parcel.of(prepared).opened()
    for left, right in zip(prepared.micro_batches, again.micro_batches, strict=True):
        same(left, right)


def hang():
    time.sleep(1000)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def refuse():
    raise DataError("the set is gone")


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (hang, "gave nothing for 2 s.*worker_timeout"),
        (die, "ended from outside"),
        (refuse, "^the set is gone$"),
    ],
)
def test_a_worker_in_trouble_ends_the_run_with_a_remedy(encoder, action, message):
    read = reader(encoder, action, batch_size=24)
    with Loader(read, workers=1, timeout=2) as loader, pytest.raises(VlmixError, match=message):
        loader.step(0, Ledger(None, max_bad=1))


def test_a_run_is_the_same_with_workers_and_says_what_padding_cost(tmp_path):
    data = [synth("caption"), synth("colour")]
    for workers in (0, 2):
        train(one_stage(*data, workers=workers, batching={"tokens": 60}), tmp_path / str(workers))
    rows = told(tmp_path / "0")
    assert rows == told(tmp_path / "2")
    assert all(row["tokens"] <= row["positions"] for row in rows)
