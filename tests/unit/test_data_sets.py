"""Published data sets: named when missing, planned when absent, counted when another file stands there."""

import json

import pytest

from tests.runs import one_stage, recipe, stage, synth, train
from vlmix.core.errors import InputError
from vlmix.core.parts import SOURCES
from vlmix.core.settings import read_settings
from vlmix.train.build import build_processor, stage_processor
from vlmix.train.data_sets import check_present, missing_paths, planned_sizes, row_notes
from vlmix.train.recipe import DataSettings, Stage


def entry(path, **more):
    return {"source": {"kind": "llava_json", "path": str(path)}, **more}


def read(*entries, **more):
    return read_settings(Stage, stage("one", {"*": 1e-3}, *entries, **more))


def test_everything_that_is_missing_is_named_at_once_before_anything_is_made(tmp_path):
    first = entry(tmp_path / "a.json", name="Set-A", rows=7, get="example.org/a, as a.json")
    first["source"]["images"] = str(tmp_path / "pictures")
    nlvr = {"source": {"kind": "nlvr", "path": str(tmp_path / "nlvr.tar"), "split": "dev"}}
    stages = [stage("x", {"*": 1}, first, entry(tmp_path / "b.json")), stage("y", {"*": 1}, first, nlvr)]
    with pytest.raises(InputError) as caught:
        train(recipe(stages=stages), tmp_path / "run")
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    assert "stages.0.data.0: Set-A: " in lines[1]
    assert all(word in lines[1] for word in ("a.json", "pictures", "example.org/a, as a.json"))
    assert "stages.0.data.1: " in lines[2]
    assert "b.json" in lines[2]
    assert "clic-lab/nlvr" in lines[3], "a source says itself where its files come from"
    assert "--tiny" in lines[4]
    assert not (tmp_path / "run").exists()
    other = {"kind": "load_encoder", "encoder": 0, "weights": str(tmp_path / "experts"), "from": 0}
    with pytest.raises(InputError, match=r"stages\.0\.start_from: nowhere not found(?s:.*)experts not found"):
        check_present(one_stage(start_from="nowhere", before=[other]))
    check_present(one_stage(synth("colour")))


@pytest.mark.parametrize("kind", SOURCES.names())
def test_every_sources_paths_are_looked_for(kind, tmp_path):
    settings = SOURCES.get(kind).tiny(tmp_path)
    assert missing_paths(DataSettings(source=settings.model_dump(mode="json"))) == []
    raw = {
        key: str(tmp_path / "gone") if key == "path" else v
        for key, v in settings.model_dump(mode="json").items()
    }
    assert bool(missing_paths(DataSettings(source=raw))) == hasattr(settings, "path")


def test_every_missing_shard_and_table_is_named_with_where_to_get_it(tmp_path):
    for number in (0, 2):
        (tmp_path / f"{number:03}.tar").write_bytes(b"")
    shards = {
        "kind": "webdataset",
        "shards": [str(tmp_path / "{000..003}.tar"), str(tmp_path / "more/*.tar")],
    }
    tables = {"kind": "hf_dataset", "path": str(tmp_path / "train.parquet"), "images": str(tmp_path / "seen")}
    many = {"kind": "webdataset", "shards": str(tmp_path / "b{00..98}.tar")}
    data = [
        {"source": shards, "name": "Tars", "get": "example.org/tars"},
        {"source": tables, "get": "example.org/tables"},
        {"source": many, "get": "example.org/many"},
        {"source": {"kind": "hf_dataset", "path": "someone/on-the-hub"}},
    ]
    with pytest.raises(InputError) as caught:
        check_present(recipe(stages=[stage("x", {"*": 1}, *data)]))
    first, second, third = str(caught.value).splitlines()[1:-1]
    assert all(word in first for word in ("001.tar", "003.tar", "more/*.tar", "Tars: ", "example.org/tars"))
    assert "000.tar" not in first
    assert all(word in second for word in ("train.parquet", "seen", "example.org/tables"))
    assert "b03.tar and 95 more not found" in third


@pytest.mark.parametrize(("rows", "told"), [(3, 0), (4, 1), (10, 1), (1000, 1), (None, 0)])
def test_another_number_of_rows_is_said_and_used(tmp_path, rows, told):
    (tmp_path / "rows.json").write_text(json.dumps([{}, {}, {}]), encoding="utf-8")
    here = read(entry(tmp_path / "rows.json", name="Set", rows=rows))
    sizes, notes = planned_sizes(here)
    assert sizes == [3]
    assert len(notes) == told
    assert not told or notes[0] == f"Set: 3 rows here, published with {rows:,}"
    assert row_notes(here, [range(3)]) == notes


@pytest.mark.parametrize(
    ("published", "found", "told"),
    [(5_581, 5_581, 0), (5_581, 5_580, 1), (39_000, 38_500, 0), (39_000, 39_501, 1), (18_000, 18_009, 0)],
)  # fmt: skip
def test_a_number_that_ends_in_zeros_is_a_rounded_one(published, found, told):
    here = read(entry("rows.json", name="Set", rows=published))
    assert len(row_notes(here, [range(found)])) == told


def test_absent_sets_are_planned_with_their_published_rows():
    sizes, notes = planned_sizes(read(entry("absent.json", name="Set", rows=558_128), synth("colour")))
    assert sizes == [558_128, 20]
    assert notes == ["Set: absent; planned with its published 558,128 rows"]
    assert planned_sizes(read(entry("absent.json")))[0] is None


def test_training_warns_of_another_number_of_rows(tmp_path):
    out = train(one_stage({**synth("colour"), "name": "Set", "rows": 21}), tmp_path / "run")
    assert "warning: stage only: Set: 20 rows here, published with 21" in out


def test_a_stage_may_write_and_frame_in_its_own_way():
    processor, _ = build_processor(one_stage())
    sample = SOURCES.get("synth")(SOURCES.get("synth").settings_class(size=1, tasks=("colour",)))[0]
    own = stage_processor(processor, read(synth("colour"), chat_template="plain", fit="crop"))
    theirs, plain = (p.encode(sample, supervise=True) for p in (processor, own))
    assert sample.turns[0].text in processor.decode(theirs.input_ids)
    assert sample.turns[0].text not in own.decode(plain.input_ids)
    assert (processor.image_processor.fit, own.image_processor.fit) == ("pad", "crop")
    assert stage_processor(processor, read(synth("colour"))) is processor
