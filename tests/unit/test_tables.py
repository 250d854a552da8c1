"""Tables of `datasets`: every form of turns and pictures, nothing decoded but by the gateway, any process."""

import pickle
import sys
from multiprocessing import get_context

import datasets
import pytest
from PIL import Image

from tests.unit.test_shards import png, read_all, resident_bytes
from vlmix.core.errors import InputError, UnknownNameError
from vlmix.core.parts import SOURCES, read_part
from vlmix.data import tables
from vlmix.data.ledger import check

TEXT = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "this"}]
PAIR = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "this"}]


@pytest.fixture
def opened(tmp_path):
    """Opens a table at a path, with what `datasets` makes kept under the test's folder."""

    def open_table(path, **more):
        raw = {"kind": "hf_dataset", "path": str(path), "cache": str(tmp_path / "cache"), **more}
        return SOURCES.get("hf_dataset")(read_part(SOURCES, raw))

    return open_table


def spoken(sample):
    return [(turn.role, turn.text, len(turn.images)) for turn in sample.turns]


@pytest.fixture
def pictures():
    words = {name: datasets.Value("string") for name in ("id", "q", "a")}
    return datasets.Features({**words, "image": datasets.Image()})


@pytest.mark.parametrize("form", ["saved", "dict", "parquet", "arrow"])
def test_every_place_on_disk_gives_the_same_rows(tmp_path, opened, pictures, form):
    raws = [png("red"), png("blue"), png("lime")]
    columns = {
        "id": list("abc"),
        "image": [{"bytes": raw, "path": None} for raw in raws],
        "q": ["Which?"] * 3,
    }
    table = datasets.Dataset.from_dict({**columns, "a": ["red", "blue", "green"]}, features=pictures)
    folder = tmp_path / "table"
    if form == "saved":
        table.save_to_disk(folder)
    elif form == "dict":
        datasets.DatasetDict({"train": table}).save_to_disk(folder)
    elif form == "parquet":
        folder.mkdir()
        table.to_parquet(folder / "0.parquet")
    else:
        table.save_to_disk(folder)
        (folder / "state.json").unlink()
    found = opened(folder, question="q", answer="a")
    assert [sample.id for sample in found] == ["a#1", "b#2", "c#3"]
    assert spoken(found[0]) == [("user", "Which?", 1), ("assistant", "red", 0)]
    assert [sample.images[0].source.open().read() for sample in found] == raws
    assert found[2].images[0].open().getpixel((0, 0)) == (0, 255, 0)
    if form == "dict":
        with pytest.raises(InputError, match="only train"):
            len(opened(folder, split="test", question="q", answer="a"))
    with pytest.raises(UnknownNameError, match="Did you mean 'q'"):
        opened(folder, question="qq", answer="a")[0]
    with pytest.raises(UnknownNameError, match="'image'"):
        opened(folder, question="q", answer="a", image="imag")[0]


def test_turns_in_every_known_wording(tmp_path, opened):
    said = {
        "llava": PAIR,
        "roles": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "this"}],
        "pairs": [{"user": "What?", "assistant": "this", "source": "x"}],
    }
    for name, turns in said.items():
        table = datasets.Dataset.from_dict(
            {"texts": [turns], "images": [[{"bytes": png(), "path": None}]]},
            features=datasets.Features(
                {"texts": [{key: datasets.Value("string") for key in turns[0]}], "images": [datasets.Image()]}
            ),
        )
        table.save_to_disk(tmp_path / name)
        sample = opened(tmp_path / name, conversations="texts", image="images")[0]
        assert [(t.role, t.text.strip(), len(t.images)) for t in sample.turns] == [
            ("user", "What?", 1),
            ("assistant", "this", 0),
        ]


def test_a_folder_with_several_splits_gives_the_one_that_was_asked_for(tmp_path, opened):
    folder = tmp_path / "training set"
    for name, rows in {"train-00000-of-00002": 3, "train-00001-of-00002": 1, "val-0": 2, "test": 5}.items():
        listed = [{"id": f"{name}.{i}", "conversations": TEXT} for i in range(rows)]
        (folder / "data").mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(listed).to_parquet(folder / f"data/{name}.parquet")
    sizes = {split: len(opened(folder, split=split)) for split in ("train", "validation", "test")}
    assert sizes == {"train": 4, "validation": 2, "test": 5}
    assert len(opened(folder / "data/test.parquet")) == 5
    (tmp_path / "rest").mkdir()
    for name in ("val-0", "test"):
        (folder / f"data/{name}.parquet").rename(tmp_path / f"rest/{name}.parquet")
    with pytest.raises(InputError, match="no file of the split 'train', only files of test, val"):
        len(opened(tmp_path / "rest"))
    (tmp_path / "plain").mkdir()
    for number, file in enumerate((tmp_path / "rest").iterdir()):
        file.rename(tmp_path / f"plain/{number}.parquet")
    assert len(opened(tmp_path / "plain")) == 7
    with pytest.raises(InputError, match="only files that name no split"):
        len(opened(tmp_path / "plain", split="test"))


def test_bad_rows_are_told_apart_and_paths_stay_inside_their_folder(tmp_path, opened):
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "pictures/in.png")
    values = [
        "in.png",
        "absent.png",
        "../secret.png",
        str(tmp_path / "secret.png"),
        None,
        "http://192.0.2.1/a.png",
        str((tmp_path / "pictures/in.png").resolve()),
        str(tmp_path / "pictures/../secret.png"),
    ]
    turns = [PAIR] * len(values)
    datasets.Dataset.from_dict({"conversations": turns, "image": values}).to_json(tmp_path / "rows.jsonl")
    found = opened(tmp_path / "rows.jsonl", images=str(tmp_path / "pictures"))
    ledger = check("t", found)
    said = ["does not exist", "leads out", "leads out", "but 0 pictures", "not a path inside", "leads out"]
    assert [any(w in r for r in [reason]) for w, reason in zip(said, ledger.bad.values(), strict=True)] == [
        True
    ] * 6
    assert ledger.used == 2
    with pytest.raises(InputError, match="Set `images`"):
        opened(tmp_path / "rows.jsonl")[0]


def test_only_the_gateway_decodes(tmp_path, opened, pictures, monkeypatch):
    columns = {"id": ["a", "b"], "image": [{"bytes": raw, "path": "x.png"} for raw in (b"no picture", png())]}
    datasets.Dataset.from_dict({**columns, "q": ["?"] * 2, "a": ["!"] * 2}, features=pictures).save_to_disk(
        tmp_path / "t"
    )
    monkeypatch.setattr(datasets.Image, "decode_example", None)
    ledger = check("t", opened(tmp_path / "t", question="q", answer="a"))
    assert list(ledger.bad) == [("t", 0)]
    assert "row 0, image does not begin like a picture" in ledger.bad["t", 0]


def test_without_the_package_the_remedy_is_named(opened, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'vlmix\[data\]'"):
        len(opened(tmp_path))
    monkeypatch.undo()
    with pytest.raises(InputError, match="files there"):
        len(opened(tmp_path))


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_other_processes_read_the_same(tmp_path, method):
    cls = SOURCES.get("hf_dataset")
    found = cls(cls.tiny(tmp_path))
    here = read_all(found)
    assert len(pickle.dumps(found)) < 2000
    assert pickle.loads(pickle.dumps(found[1].images[1])).open().tobytes() == here[1][1][1]
    with get_context(method).Pool(1) as pool:
        assert pool.map(read_all, [found]) == [here]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_stays_flat_over_ten_thousand_samples(tmp_path):
    """As for shards: 4 MiB between rows 1,000 and 10,000."""
    cls = SOURCES.get("hf_dataset")
    found = cls(cls.tiny(tmp_path))
    for number in range(10_000):
        for image in found[number % 3].images:
            image.open()
        if number == 1000:
            first = resident_bytes()
    assert resident_bytes() - first < 4 * 2**20
    assert tables.rows_in(found._place) == 3
