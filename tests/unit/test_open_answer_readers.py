"""Benchmarks of captions, boxes, sentences and open questions, read from the layouts they are had in."""

import json
import shutil

import pytest

from tests.judge_server import judging
from vlmix.core.errors import ImageError, InputError, RecipeError
from vlmix.core.parts import BENCHMARKS, SCORERS, read_part
from vlmix.core.sample import Answer
from vlmix.evals.benchmarks._tiny import draw
from vlmix.evals.controls import targets_of
from vlmix.evals.scoring import _caption_scorer

QUESTIONS = {
    "coco_caption": ("dataset_coco.json", "images", "sentences"),
    "nocaps": ("nocaps_val_4500_captions.json", "images", "file_name"),
    "textcaps": ("TextCaps_0.1_val.json", "data", "caption_str"),
    "nlvr2": ("test1.json", None, "label"),
    "refcoco": ("refcoco_testB.jsonl", None, "bbox"),
    "mmvet": ("mm-vet.json", None, "capability"),
    "llava_bench": ("questions.jsonl", None, "category"),
}
"""The file with the questions, where in it they are, and a field that none can do without."""


@pytest.fixture(params=QUESTIONS)
def benchmark(request, tmp_path):
    return BENCHMARKS.get(request.param).tiny(tmp_path)


def again(benchmark, **changed):
    """The same benchmark with other settings, its files read anew."""
    raw = {**benchmark.settings.model_dump(mode="json"), **changed}
    return type(benchmark)(read_part(BENCHMARKS, raw))


def headline(benchmark, *, scores=False):
    """What right answers to all questions that can be asked are worth."""
    samples = benchmark.samples()
    answers = [Answer(s.id, targets_of(s)[0] if s.target else "", error=s.defect) for s in samples]
    judged = benchmark.judge(samples, answers)
    return judged if scores else benchmark.summarise(judged)[benchmark.headline]


def read(path):
    text = path.read_text(encoding="utf-8")
    try:
        return json.loads(text)
    except ValueError:
        return [json.loads(line) for line in text.splitlines()]


def spoil(path, where, field):
    """Take a field from one question of a file, the last but for those that are not asked."""
    whole = read(path)
    held = whole if where is None else whole[where]
    rows = [row for row in (held.values() if isinstance(held, dict) else held) if row.get("split") != "train"]
    del rows[-1][field]
    lines = isinstance(whole, list)
    text = "".join(json.dumps(row) + "\n" for row in whole) if lines else json.dumps(whole)
    path.write_text(text, encoding="utf-8")


def test_a_line_without_a_field_is_listed_and_counts_as_wrong(benchmark):
    best, count = headline(benchmark), len(benchmark.samples())
    name, where, field = QUESTIONS[benchmark.settings.kind]
    spoil(benchmark.settings.path / name, where, field)
    spoiled = again(benchmark)
    broken = [sample for sample in spoiled.samples() if sample.defect]
    assert len(spoiled.samples()) >= count
    assert [sample.defect.startswith(f"{name}:") for sample in broken] == [True]
    assert 0 < headline(spoiled) < best
    assert min(score.value for score in headline(spoiled, scores=True)) == 0


def test_a_missing_picture_leaves_its_question(benchmark):
    sample = benchmark.samples()[0]
    folders = {image.source.parent for image in sample.images}
    for folder in folders:
        shutil.rmtree(folder)
    found = again(benchmark).samples()
    assert [each.id for each in found] == [each.id for each in benchmark.samples()]
    assert found[0].images
    for image in found[0].images:
        with pytest.raises(ImageError):
            image.open()


def test_files_that_are_not_there_are_named_with_where_they_are_had(benchmark):
    name, _, _ = QUESTIONS[benchmark.settings.kind]
    for path in benchmark.settings.path.glob(f"{name.rpartition('_test')[0] or name}*"):
        path.unlink()
    with pytest.raises(InputError, match=r"there is no .*(had|in|file|publish)"):
        again(benchmark).samples()


@pytest.mark.parametrize(
    ("name", "split"), [("coco_caption", "test2014"), ("nocaps", "test"), ("textcaps", "test")]
)
def test_a_split_without_answers_is_refused_with_one_that_has_them(tmp_path, name, split):
    with pytest.raises(RecipeError, match=f"'{split}' .*answers are published; ask .*val"):
        again(BENCHMARKS.get(name).tiny(tmp_path), split=split)


def test_coco_is_read_as_karpathy_as_blip_and_as_coco_itself_have_it(tmp_path):
    karpathy = BENCHMARKS.get("coco_caption").tiny(tmp_path)
    asked = karpathy.samples()
    (tmp_path / "dataset_coco.json").unlink()
    rows = [{"image": f"val2014/{s.images[0].source.name}", "caption": list(targets_of(s))} for s in asked]
    (tmp_path / "coco_karpathy_test.json").write_text(json.dumps(rows), encoding="utf-8")
    images = [{"id": n, "file_name": s.images[0].source.name} for n, s in enumerate(asked)]
    captions = [{"image_id": n, "caption": text} for n, s in enumerate(asked) for text in targets_of(s)]
    (tmp_path / "annotations").mkdir()
    path = tmp_path / "annotations/captions_val2014.json"
    path.write_text(json.dumps({"images": images, "annotations": captions}), encoding="utf-8")
    for other in (again(karpathy), again(karpathy, split="val2014")):
        found = other.samples()
        assert [each.target for each in found] == [each.target for each in asked]
        assert [each.images for each in found] == [each.images for each in asked]


def test_captions_of_no_picture_and_pictures_without_captions_are_lines_too(tmp_path):
    nocaps = BENCHMARKS.get("nocaps").tiny(tmp_path)
    path = tmp_path / QUESTIONS["nocaps"][0]
    whole = read(path)
    whole["annotations"][0] = {"image_id": 99, "caption": "of nothing"}
    whole["annotations"][1]["caption"] = " "
    path.write_text(json.dumps(whole), encoding="utf-8")
    defects = [sample.defect for sample in again(nocaps).samples() if sample.defect]
    assert len(defects) == 3
    for words in ("annotations[1]", "no caption", ":99: its captions are there"):
        assert any(words in defect for defect in defects)


def test_what_was_read_is_not_read_again_to_sum_up_parts_of_it(tmp_path, monkeypatch):
    nocaps = BENCHMARKS.get("nocaps").tiny(tmp_path)
    scores = headline(nocaps, scores=True)
    whole = nocaps.summarise(scores)

    def never(_):
        raise AssertionError("read again")

    monkeypatch.setattr(_caption_scorer, "tokenize", never)
    assert nocaps.summarise(scores) == whole
    part = nocaps.summarise(scores[:2])
    assert {name for name in part if name.startswith("in-domain")} < set(part)
    assert not any(name.startswith("out-domain") for name in part)


@pytest.mark.parametrize("protocol", SCORERS.get("refcoco").protocols)
@pytest.mark.parametrize("padded", [False, True])
def test_a_box_is_right_in_the_form_of_each_protocol(tmp_path, protocol, padded):
    refcoco = again(BENCHMARKS.get("refcoco").tiny(tmp_path), protocol=protocol, padded=padded)
    assert headline(refcoco) == 1.0
    sample = refcoco.samples()[0]
    assert sample.meta["gold"] == ([2.5, 8.0, 12.5, 24.25] if padded else [2.5, 4.0, 12.5, 20.25])
    assert (
        targets_of(sample)[0]
        == {
            ("lmms_eval", False): "[0.078, 0.167, 0.391, 0.844]",
            ("lmms_eval", True): "[0.078, 0.250, 0.391, 0.758]",
            ("internvl", False): "[[78, 167, 391, 844]]",
            ("internvl", True): "[[78, 250, 391, 758]]",
            ("qwen_vl", False): "(78,166),(390,843)",
            ("qwen_vl", True): "(78,250),(390,757)",
            ("pixels", False): "[2.5, 4, 12.5, 20.25]",
            ("pixels", True): "[2.5, 8, 12.5, 24.25]",
        }[protocol, padded]
    )


def test_the_splits_of_boxes_are_figures_of_their_own_and_pickles_are_not_read(tmp_path):
    refcoco = again(BENCHMARKS.get("refcoco").tiny(tmp_path), splits=["testB", "val"])
    assert [sample.task for sample in refcoco.samples()] == ["testB"] * 4 + ["val"] * 4
    assert {"testB.ACC@0.5", "val.ACC@0.5"} < set(refcoco.summarise(headline(refcoco, scores=True)))
    with pytest.raises(RecipeError, match="refcocog has no split 'testA', only val, test"):
        again(refcoco, dataset="refcocog", splits=["testA"])
    (tmp_path / "refcoco+").mkdir()
    (tmp_path / "refcoco+/refs(unc).p").write_bytes(b"")
    with pytest.raises(InputError, match=r"refcoco\+_val.jsonl.*pickles.*not read"):
        again(refcoco, dataset="refcoco+", splits=[]).samples()
    with pytest.raises(RecipeError, match=r"no \{sentence\} in it"):
        again(refcoco, template="Where?")


def test_nlvr2_finds_its_pictures_and_parts_where_they_are_published(tmp_path):
    nlvr2 = BENCHMARKS.get("nlvr2").tiny(tmp_path)
    first = nlvr2.samples()[0]
    assert [image.source.name for image in first.images] == ["test1-3-0-img0.png", "test1-3-0-img1.png"]
    assert first.options == ("True", "False")
    (tmp_path / "images").mkdir()
    (tmp_path / "test1").rename(tmp_path / "images/test1")
    (tmp_path / "nlvr2/data/balanced").mkdir(parents=True)
    (tmp_path / "test1.json").rename(tmp_path / "nlvr2/data/balanced/balanced_test1.json")
    moved = again(nlvr2, subset="balanced").samples()
    assert [each.id for each in moved] == [each.id for each in nlvr2.samples()]
    assert moved[0].images[1].open().size == (32, 24)


def test_a_question_without_reference_or_description_cannot_be_marked(tmp_path):
    bench = BENCHMARKS.get("llava_bench").tiny(tmp_path)
    for name, words in (
        ("answers_gpt4.jsonl", "has no answer to it"),
        ("context.jsonl", "does not describe"),
    ):
        path = tmp_path / name
        kept = path.read_text(encoding="utf-8")
        path.write_text(kept[kept.index("\n") + 1 :], encoding="utf-8")
        defects = [sample.defect for sample in again(bench).samples() if sample.defect]
        assert defects
        assert all(words in defect for defect in defects)
        path.write_text(kept, encoding="utf-8")


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


def with_judge(benchmark, url, **changed):
    server = {"url": url, "model": "marker", "timeout_seconds": 0.3, "tries": 1, "wait_seconds": 0}
    return again(benchmark, judge={"server": server}, **changed)


def test_without_a_judge_answers_are_compared_and_the_reader_is_told(tmp_path):
    for name, free in (("mmvet", "elements"), ("llava_bench", "rouge_l")):
        bench = BENCHMARKS.get(name).tiny(tmp_path / name)
        assert bench.protocol == free
        assert all(words in bench.note for words in (name, "no judge", free, "gpt4", "--judge"))
        with pytest.raises(RecipeError, match="needs a judge"):
            again(bench, protocol="gpt4")
        with pytest.raises(RecipeError, match="there is none"):
            again(bench, rules="rules.txt")
        with pytest.raises(RecipeError, match="needs no judge"):
            with_judge(bench, "http://localhost:1", protocol=free)


def test_what_a_judge_does_not_mark_counts_as_wrong_and_is_counted(tmp_path):
    plain = BENCHMARKS.get("mmvet").tiny(tmp_path)
    said = {"a pear": "1.0", "ten to ten": "0.5", "minus five": "perfect", "a cat": None}

    def marks(prompt):
        table = prompt.split("1.0\n")[-1]
        return next(said[answer] for answer in said if answer in table)

    with judging(marks) as (url, seen):
        judged = with_judge(plain, url)
        scores = headline(judged, scores=True)
    assert (judged.protocol, judged.note) == ("gpt4", "")
    assert [score.value for score in scores] == [1.0, 0.5, 0.0, 0.0]
    assert [score.state for score in scores] == ["read", "read", "failed", "failed"]
    assert "perfect" in scores[2].parsed
    assert "no reply within" in scores[3].parsed
    figures = judged.summarise(scores)
    assert (figures["total_percent"], figures["judge_failed"]) == (37.5, 0.5)
    assert all(body["model"] == "marker" for _, body in seen)


def test_the_official_words_to_a_judge_come_from_a_file(tmp_path):
    rules = tmp_path / "rule.json"
    words = {
        f"llava_bench_{kind}": {"role": "Assistant", "prompt": f"Mark {kind}."} for kind in ("conv", "detail")
    }
    rules.write_text(json.dumps({**words, "llava_bench_complex": {"prompt": "Mark it."}}), encoding="utf-8")
    bench = BENCHMARKS.get("llava_bench").tiny(tmp_path / "bench")
    with judging(lambda _: "8 6\nFine.") as (url, seen):
        judged = with_judge(bench, url, rules=str(rules))
        scores = headline(judged, scores=True)
    assert judged.summarise(scores)[judged.headline] == 75.0
    prompts = sorted(body["messages"][-1]["content"].strip().rpartition("\n")[2] for _, body in seen)
    assert prompts == ["Mark conv.", "Mark conv.", "Mark detail.", "Mark it."]
    rules.write_text("[]", encoding="utf-8")
    with pytest.raises(InputError, match=r"no rule\.json"):
        with_judge(bench, "http://localhost:1", rules=str(rules))


CAPTIONS = ["A red bus.", "a bus"]
TABLES = {
    "coco_caption": (
        "data/val-00000-of-00001.parquet",
        {"question_id": "COCO_val2014_000000000042.jpg", "answer": CAPTIONS},
        ("COCO_val2014_000000000042.jpg", tuple(CAPTIONS), ""),
    ),
    "nocaps": (
        "data/validation-00000-of-00001.parquet",
        {"image_id": 7, "annotations_captions": CAPTIONS},
        ("7", tuple(CAPTIONS), ""),
    ),
    "textcaps": (
        "data/val-00000-of-00001.parquet",
        {"image_id": "0054", "caption_str": CAPTIONS, "question": "?"},
        ("0054", tuple(CAPTIONS), ""),
    ),
    "refcoco": (
        "data/val-00000-of-00001.parquet",
        {
            "question_id": "9",
            "answer": ["left bus"],
            "bbox": [8.0, 6.0, 16.0, 12.0],
            "file_name": "COCO_9.jpg",
        },
        ("val/table:1/0", ("[0.250, 0.250, 0.750, 0.750]",), "val"),
    ),
    "mmvet": (
        "data/test-00000-of-00001.parquet",
        {"question_id": "v1_3", "question": "What?", "answer": "a bus", "capability": "rec,ocr"},
        ("v1_3", ("a bus",), "ocr_rec"),
    ),
    "llava_bench": (
        "data/train-00000-of-00001.parquet",
        {
            "question_id": "3",
            "question": "What?",
            "category": "conv",
            "image_id": "001",
            "gpt_answer": "A bus.",
            "caption": "A bus.",
        },
        ("3", ("A bus.",), "conv"),
    ),
}
"""A benchmark's published table: its file, a row, and id, targets and task of the question."""
CHOSEN = {"coco_caption": {"split": "val2014"}, "refcoco": {"splits": ["val"]}}


@pytest.mark.parametrize("name", TABLES)
def test_the_published_table_does_as_well(tmp_path, name):
    pa = pytest.importorskip("pyarrow", reason="a table needs the extra `data`")
    import pyarrow.parquet as pq

    tiny = BENCHMARKS.get(name).tiny(tmp_path / "files")
    draw(tmp_path, "shown.png")
    file, row, (number, *asked) = TABLES[name]
    picture = {"bytes": (tmp_path / "shown.png").read_bytes(), "path": "shown.png"}
    path = tmp_path / "table" / file
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([{**row, "image": picture}]), path)
    changed = {"path": str(tmp_path / "table"), "cache": str(tmp_path / "cache"), **CHOSEN.get(name, {})}
    (sample,) = again(tiny, **changed).samples()
    assert (sample.id, sample.defect) == (number, "")
    assert [targets_of(sample), sample.task] == asked
    assert sample.images[0].open().size == (32, 24)
