"""`vlmix data`: what is wrong with a set is found and counted; packed rows read back as they were."""

import json
import re
import shlex

import numpy as np
import pytest
import webdataset
import yaml
from PIL import Image
from typer.testing import CliRunner

from tests.conformance.test_sources import content
from tests.conftest import ROOT
from tests.flow.test_resume import stop_after
from tests.runs import TINY, recipe, told, train
from vlmix.cli.main import app
from vlmix.core.errors import DataError, InterruptedRunError
from vlmix.core.files import verify_manifest
from vlmix.core.parts import SOURCES, read_part
from vlmix.core.sample import ImageRef
from vlmix.data.check import Look, Words, check_source
from vlmix.data.ledger import Ledger
from vlmix.data.pack import pack

pytestmark = pytest.mark.flow
ROWS = 40


def row(name, image, question="<image>\nWhat is it?", answer="a thing"):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": image, "conversations": turns}


@pytest.fixture
def mine(tmp_path):
    """Forty rows: four bad ones, each in its own way; an id and pictures that repeat."""
    rng, folder = np.random.default_rng(0), tmp_path / "mine"
    folder.mkdir()
    names = [f"{i:02}.{'png' if i % 2 else 'jpg'}" for i in range(ROWS)]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (24, 32, 3)).astype(np.uint8)).save(folder / name)
    rows = [row(f"r{i}", name, answer="word " * (i + 1)) for i, name in enumerate(names)]
    rows[3]["image"] = "absent.png"
    rows[4]["conversations"][0]["value"] = "<image><image> two?"
    (folder / names[6]).write_bytes((folder / names[6]).read_bytes()[:-100])
    rows[8]["conversations"][1]["value"] = 7
    rows[10]["id"] = "r9"
    rows[12]["image"] = names[14]
    (folder / names[17]).write_bytes((folder / names[19]).read_bytes())
    rows[20] |= row("r20", [names[21], names[21]], "<image><image>\nSame?", "yes")
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


def source_of(kind, **settings):
    return SOURCES.get(kind)(read_part(SOURCES, {"kind": kind, **settings}))


def vlmix(*arguments):
    """What it says on both streams, and the exit code or the error that decides it."""
    run = CliRunner().invoke(app, ["data", *map(str, arguments)])
    if run.exception is not None and not isinstance(run.exception, SystemExit):
        return str(run.exception), getattr(run.exception, "exit_code", None)
    return run.output, run.exit_code


def test_check_finds_each_fault_and_the_counts_add_up(mine, tmp_path):
    said, code = vlmix("check", mine, "--out", tmp_path / "report")
    assert code == 2
    assert "4 of 40 rows are bad, more than 1.00%" in said
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert report["rows"] == {"read": 40, "used": 36, "quarantined": 4}
    (found,) = report["sets"]
    assert found["faults"] == {"missing": 1, "placeholders": 1, "corrupt": 1, "malformed": 1}
    assert found["repeated_ids"] == {"count": 1, "first_rows": [10]}
    pictures = found["pictures"]
    assert pictures["twice_in_one_row"] == {"count": 1, "first_rows": [20]}
    assert (pictures["in_several_places"], pictures["in_several_rows"]["count"]) == (1, 3)
    assert (found["unit"], found["lengths"]["text"]["max"], found["lengths"]["visual"]["max"]) == (
        "words",
        43,
        0,
    )
    listed = [json.loads(line) for line in (tmp_path / "report/quarantine.jsonl").read_text().splitlines()]
    assert [(entry["row"], entry["line"], entry["reason"].partition(":")[0]) for entry in listed] == [
        (3, 4, "missing"), (4, 5, "placeholders"), (6, 7, "corrupt"), (8, 9, "malformed"),
    ]  # fmt: skip
    assert ImageRef(tmp_path / "report/lengths.png").size()[0] > 300
    verify_manifest(tmp_path / "report", "vlmix.data_check/1")
    said, code = vlmix("check", mine, "--out", tmp_path / "report", "--max-bad", "0.1")
    assert code == 0, said
    assert "40 rows read = 36 used + 4 quarantined" in said


def test_a_report_replaces_nothing_but_a_report(mine, tmp_path):
    said, code = vlmix("check", mine, "--out", mine.parent)
    assert (code, "no report of a check" in said) == (2, True)
    assert mine.is_file()


@pytest.mark.slow
def test_several_processes_find_what_one_finds(mine):
    look = Look(source_of("llava_json", path=str(mine)), Words())
    ledgers = [Ledger(None, max_bad=1.0) for _ in range(2)]
    one, two = (check_source("x", look, ledger, workers=n) for n, ledger in zip((0, 2), ledgers, strict=True))
    assert one == two
    assert ledgers[0].to_dict() == ledgers[1].to_dict()
    assert sum(one.faults.values()) == 4


def test_a_recipe_is_checked_with_its_own_tokens_and_limit(mine, tmp_path):
    raw = recipe().model_dump(mode="json")
    data = {"source": {"kind": "llava_json", "path": str(mine)}}
    raw["stages"] = [{**TINY["stages"][0], "data": [data], "name": "one"}]
    raw["model"]["max_length"] = 50
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(raw))
    said, code = vlmix("check", path, "--out", tmp_path / "report", "--max-bad", "1")
    assert code == 0, said
    (found,) = json.loads((tmp_path / "report/report.json").read_text())["sets"]
    assert (found["unit"], found["max_length"]) == ("tokens", 50)
    assert found["name"] == "one.data.0.llava_json"
    assert found["lengths"]["visual"]["min"] == 4
    assert found["lengths"]["visual"]["max"] == 8
    assert found["lengths"]["total"]["max"] > 50
    assert found["faults"]["too_long"] == found["over_max_length"] > 0
    raw["stages"][0]["data"] = [{**data, "source": {**data["source"], "path": "nowhere.json"}}]
    path.write_text(yaml.safe_dump(raw))
    said, code = vlmix("check", path, "--out", tmp_path / "other")
    assert (code, "nowhere.json not found" in said) == (2, True)
    assert not (tmp_path / "other").exists()


def test_packed_rows_read_back_the_same_and_bad_ones_are_listed(mine, tmp_path):
    source, shards = source_of("llava_json", path=str(mine)), tmp_path / "shards"
    said, code = vlmix("pack", mine, shards, "--shard-size", "20KB")
    assert code == 0, said
    assert "40 rows read = 36 used + 4 quarantined" in said
    manifest = verify_manifest(shards, "vlmix.shards/1")
    assert sum(name.endswith(".tar") for name in manifest["files"]) >= 4
    assert all((shards / name).stat().st_size <= 40_000 for name in manifest["files"])
    packed = source_of("webdataset", shards=str(shards))
    good = [sample for sample in map(readable(source), range(ROWS)) if sample is not None]
    assert [content(sample) for sample in packed] == [content(sample) for sample in good]
    for one, other in zip(packed, good, strict=True):
        for copied, picture in zip(one.images, other.images, strict=True):
            assert copied.source.open().read() == picture.source.read_bytes()
    again = tmp_path / "again"
    pack(source, again, shard_bytes=20_000, max_bad=1.0)
    for name in manifest["files"]:
        assert (again / name).read_bytes() == (shards / name).read_bytes()
    said, code = vlmix("pack", mine, shards)
    assert (code, "exists" in said) == (2, True)


def readable(source):
    ledger = Ledger(None, max_bad=1.0)

    def read(index):
        return source[index] if ledger.take("x", source, index) else None

    return read


@pytest.mark.parametrize("kind", SOURCES.names())
def test_every_source_packs_to_the_same_samples(kind, tmp_path):
    cls = SOURCES.get(kind)
    source = cls(cls.tiny(tmp_path))
    pack(source, tmp_path / "shards")
    packed = source_of("webdataset", shards=str(tmp_path / "shards"))
    assert [content(sample) for sample in packed] == [content(sample) for sample in source]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves files open
def test_webdataset_reads_what_was_packed(mine, tmp_path):
    pack(source_of("llava_json", path=str(mine)), tmp_path / "shards", shard_bytes=30_000)
    ours = source_of("webdataset", shards=str(tmp_path / "shards"))
    urls = sorted(map(str, (tmp_path / "shards").glob("*.tar")))
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert len(theirs) == len(ours) == 36
    for sample, raw in zip(ours, theirs, strict=True):
        said = json.loads(raw["json"])
        assert said["id"] == sample.id
        assert said["conversations"][-1]["value"] == sample.turns[-1].text
        stored = [raw[key] for key in sorted(raw) if key.endswith(("png", "jpg"))]
        assert stored == [image.source.open().read() for image in sample.images]


def test_pictures_shrink_only_where_asked(tmp_path):
    for name, size in {"large.png": (300, 100), "small.png": (20, 10), "large.jpg": (90, 200)}.items():
        Image.new("RGB", size, "teal").save(tmp_path / name)
    rows = [row(name, name) for name in ("large.png", "small.png", "large.jpg")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    pack(source_of("llava_json", path=str(tmp_path / "rows.json")), tmp_path / "shards", max_side=60)
    found = source_of("webdataset", shards=str(tmp_path / "shards"))
    assert [sample.images[0].size() for sample in found] == [(60, 20), (20, 10), (27, 60)]
    assert found[1].images[0].source.open().read() == (tmp_path / "small.png").read_bytes()
    assert [sample.images[0].source.member.rpartition(".")[2] for sample in found] == ["png", "png", "jpg"]


def test_packing_that_stops_leaves_nothing(mine, tmp_path):
    (mine.parent / "11.png").unlink()
    for number in range(21, 40):
        (mine.parent / f"{number}.{'png' if number % 2 else 'jpg'}").write_bytes(b"x")
    with pytest.raises(DataError, match="rows read are bad"):
        pack(source_of("llava_json", path=str(mine)), tmp_path / "shards")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def test_training_from_shards_is_training_from_the_file(mine, tmp_path, monkeypatch):
    """Same rows, order and weights with worker processes, and stopped and resumed without: metrics agree."""
    rows = [json.loads(line) for line in mine.read_text().splitlines()]
    kept = [each for i, each in enumerate(rows) if i not in {3, 4, 6, 8}]
    mine.write_text("".join(json.dumps(each) + "\n" for each in kept))
    pack(source_of("llava_json", path=str(mine)), tmp_path / "shards", shard_bytes=20_000)

    def trained(out, workers, resume=False, **source):
        stage = {**TINY["stages"][0], "data": [{"source": source}], "workers": workers}
        train(recipe(stages=[stage], model={**TINY["model"], "max_length": 400}), tmp_path / out, resume)
        return told(tmp_path / out)

    tars = {"kind": "webdataset", "shards": str(tmp_path / "shards")}
    whole = trained("file", 0, kind="llava_json", path=str(mine))
    assert len(whole) == 3
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(InterruptedRunError):
            trained("tars", 2, **tars)
    assert trained("tars", 0, resume=True, **tars) == whole
    names = [tmp_path / out / "model/model.safetensors" for out in ("file", "tars")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_show_prints_a_row_and_writes_a_page_that_runs_nothing(mine, tmp_path):
    lines = mine.read_text().splitlines()
    lines[0] = json.dumps(row("x", "00.jpg", "<image>\n<script>alert(1)</script>", "[red]{{ 7 * 7 }}"))
    mine.write_text("\n".join(lines))
    said, code = vlmix("show", mine, "--out", tmp_path / "page.html", "--count", 9)
    assert code == 0, said
    assert "assistant: [red]{{ 7 * 7 }}" in said
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert page.count("data:image/png;base64,") == 5
    assert "does not exist" in page
    assert "damaged JPEG" in page
    said, code = vlmix("show", mine, "--row", 3, "--out", tmp_path / "page.html")
    assert (code, "cannot be used" in said) == (0, True)
    said, code = vlmix("show", mine, "--row", 99)
    assert (code, "has 40 rows" in said) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["check", "nowhere.json"], "does not exist"),
        (["check", "notes.txt"], "no known data set"),
        (["check", "empty"], "no tars, tables or LLaVA JSON"),
        (["check", "demo", "--tokenizer", "x"], "leave --images, --set and --tokenizer out"),
        (["check", "rows.json", "--max-length", "7"], "give --tokenizer"),
        (["check", "rows.json", "--tokenizer", "empty"], "no tokenizer there"),
        (["check", "rows.json", "--set", "pth=x"], "Did you mean 'path'"),
        (["pack", "rows.json", "out", "--shard-size", "big"], "500MB"),
    ],
)
def test_a_mistake_is_named_with_its_remedy_and_writes_nothing(tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "rows.json").write_text("[]")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    said, code = vlmix(*arguments)
    assert (code, says in said) == (2, True), said
    assert sorted(tmp_path.rglob("*")) == before


def test_a_tokenizer_counts_text_and_pictures(mine, tmp_path):
    train(recipe(stages=[{**TINY["stages"][0], "steps": 1}]), tmp_path / "run")
    said, code = vlmix(
        "check", mine, "--tokenizer", tmp_path / "run", "--visual-tokens", 5, "--max-length", 40,
        "--max-bad", 1, "--out", tmp_path / "report",
    )  # fmt: skip
    assert code == 0, said
    (found,) = json.loads((tmp_path / "report/report.json").read_text())["sets"]
    assert (found["unit"], found["max_length"]) == ("tokens", 40)
    assert (found["lengths"]["visual"]["min"], found["lengths"]["visual"]["max"]) == (5, 10)
    assert found["faults"]["too_long"] == found["over_max_length"] > 0


def test_the_commands_of_the_page_run(mine, tmp_path, monkeypatch):
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    commands = [shlex.split(line, comments=True)[2:] for line in re.findall(r"^vlmix data .*$", page, re.M)]
    assert {arguments[0] for arguments in commands} == {"show", "check", "pack"}
    kept = [
        each for i, each in enumerate(map(json.loads, mine.read_text().splitlines())) if i not in {3, 4, 6, 8}
    ]
    (mine.parent / "rows.json").write_text(json.dumps(kept))
    monkeypatch.chdir(tmp_path)
    for arguments in commands:
        serial = [word for word in arguments if word not in {"--workers", "2"}]
        said, code = vlmix(*(arguments if "--row" in arguments else serial))
        assert code == 0, (arguments, said)
    for block in re.findall(r"```yaml\n(data:.*?)```", page, re.S):
        for data in yaml.safe_load(block)["data"]:
            assert read_part(SOURCES, data["source"]).kind in {"webdataset", "hf_dataset"}
