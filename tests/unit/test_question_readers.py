"""Benchmarks of short answers and diagrams, read from the layouts they are published in."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from vlmix.core.errors import ImageError, InputError, RecipeError
from vlmix.core.parts import BENCHMARKS, SCORERS, read_part
from vlmix.core.sample import Answer
from vlmix.evals.benchmarks._annotators import best_answers
from vlmix.evals.benchmarks._tiny import draw
from vlmix.evals.controls import targets_of

QUESTIONS = {
    "vqav2": ("v2_OpenEnded_mscoco_val2014_questions.json", "questions", "question"),
    "gqa": ("testdev_balanced_questions.json", "22", "answer"),
    "vizwiz": ("Annotations/val.json", None, "answers"),
    "textvqa": ("TextVQA_0.5.1_val.json", "data", "answers"),
    "ocrbench": ("OCRBench.json", None, "type"),
    "chartqa": ("test/test_augmented.json", None, "label"),
    "docvqa": ("val_v1.0_withQT.json", "data", "answers"),
    "infovqa": ("infographicsVQA_val_v1.0_withQT.json", "data", "image_local_name"),
    "ai2d": ("questions/12.png.json", "questions", "answerTexts"),
}
"""The file with the questions, where in it they are, and a field that none can do without."""
KEPT_BACK = {"vqav2": "test-dev", "textvqa": "test", "docvqa": "test", "infovqa": "test"}


@pytest.fixture(params=QUESTIONS)
def benchmark(request, tmp_path):
    return BENCHMARKS.get(request.param).tiny(tmp_path)


def again(benchmark, **changed):
    """The same benchmark with other settings, its files read anew."""
    raw = {**benchmark.settings.model_dump(mode="json"), **changed}
    return type(benchmark)(read_part(BENCHMARKS, raw))


def rows_of(value, where):
    """The last row, as it can be changed."""
    held = value[where] if where else value
    return held[-1] if isinstance(held, list) else held if "answer" in held else list(held.values())[-1]


def changed_file(benchmark, change):
    """Change the last question of the published file."""
    name, where, field = QUESTIONS[benchmark.settings.kind]
    path = benchmark.settings.path / name
    value = json.loads(path.read_text(encoding="utf-8"))
    change(rows_of(value, where), field)
    path.write_text(json.dumps(value), encoding="utf-8")
    return again(benchmark)


def perfect(benchmark):
    samples = benchmark.samples()
    answers = [Answer(s.id, targets_of(s)[0] if targets_of(s) else "", error=s.defect) for s in samples]
    return benchmark.judge(samples, answers)


def share(benchmark, scores):
    """The headline as a share of 1."""
    best = {"": 1.0, "%": 100.0}[benchmark.unit(benchmark.headline)]
    return benchmark.summarise(scores)[benchmark.headline] / best


def test_targets_are_right_by_every_protocol(benchmark):
    for protocol in SCORERS.get(benchmark.settings.kind).protocols:
        asked = again(benchmark, protocol=protocol)
        assert [score.value for score in perfect(asked)] == [1.0] * len(asked.samples())
        assert share(asked, perfect(asked)) == 1.0
        silent = asked.judge(asked.samples(), [Answer(s.id, "", error="no") for s in asked.samples()])
        assert share(asked, silent) == 0.0


def test_a_line_that_lacks_a_field_is_listed_and_counts_as_wrong(benchmark):
    whole = benchmark.samples()
    broken = changed_file(benchmark, lambda row, field: row.pop(field))
    bad = [sample for sample in broken.samples() if sample.defect]
    assert len(bad) == 1
    assert len(broken.samples()) == len(whole)
    assert Path(QUESTIONS[benchmark.settings.kind][0]).name in bad[0].defect
    assert share(broken, perfect(broken)) == pytest.approx(1 - 1 / len(whole), abs=1e-4)


def test_a_question_whose_picture_is_gone_stays_and_fails_when_shown(benchmark):
    samples = benchmark.samples()
    gone = benchmark.settings.path.rglob("*.*g")
    for file in [path for path in gone if path.suffix in {".jpg", ".png", ".jpeg"}]:
        file.unlink()
    kept = again(benchmark).samples()
    assert [(s.id, s.defect) for s in kept] == [(s.id, "") for s in samples]
    with pytest.raises(ImageError, match="does not exist"):
        kept[-1].images[0].open()


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("gqa", "imageId"),
        ("vizwiz", "image"),
        ("textvqa", "image_id"),
        ("ocrbench", "image_path"),
        ("chartqa", "imgname"),
    ],
)
def test_names_of_pictures_do_not_lead_out_of_their_folder(tmp_path, name, field):
    tiny = BENCHMARKS.get(name).tiny(tmp_path)
    led_out = changed_file(tiny, lambda row, _: row.update({field: "../../secret"}))
    assert [bool(s.defect) for s in led_out.samples()] == [False] * (len(tiny.samples()) - 1) + [True]


def test_a_missing_file_is_named_with_where_it_is_had(benchmark, tmp_path):
    name = QUESTIONS[benchmark.settings.kind][0]
    target = benchmark.settings.path / (name if benchmark.settings.kind != "ai2d" else "questions")
    target.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=rf"there is no .*{target.name.split('.')[0]}.*\. .+"):
        again(benchmark).samples()
    with pytest.raises(InputError):
        again(benchmark, path=str(tmp_path / "nowhere")).samples()


@pytest.mark.parametrize(("name", "split"), KEPT_BACK.items())
def test_splits_without_published_answers_say_which_has_them(tmp_path, name, split):
    with pytest.raises(RecipeError, match=f"'{split}'.*published.*ask val"):
        again(BENCHMARKS.get(name).tiny(tmp_path), split=split)


def test_vizwiz_test_is_scored_only_from_a_file_with_answers(tmp_path):
    tiny = BENCHMARKS.get("vizwiz").tiny(tmp_path)
    rows = json.loads((tmp_path / "Annotations" / "val.json").read_text(encoding="utf-8"))
    bare = [{"image": row["image"], "question": row["question"]} for row in rows]
    (tmp_path / "test.json").write_text(json.dumps(bare), encoding="utf-8")
    with pytest.raises(InputError, match=r"test\.json has no answers.*val"):
        again(tiny, split="test").samples()
    (tmp_path / "VQA_test.json").write_text(json.dumps(rows), encoding="utf-8")
    assert len(again(tiny, split="test").samples()) == len(rows)


def test_gqa_asks_unbalanced_questions_for_consistency_alone(tmp_path):
    tiny = BENCHMARKS.get("gqa").tiny(tmp_path)
    rows = json.loads((tmp_path / "testdev_balanced_questions.json").read_text(encoding="utf-8"))
    rows["12"]["isBalanced"] = False
    (tmp_path / "questions1.2").mkdir()
    (tmp_path / "questions1.2" / "val_all_questions.json").write_text(json.dumps(rows), encoding="utf-8")
    choices = {name: {"valid": [row["answer"]], "plausible": []} for name, row in rows.items()}
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "val_choices.json").write_text(json.dumps(choices), encoding="utf-8")
    both = again(tiny, split="val_all")
    assert [score.counted for score in perfect(both)] == [True, False, True, True]
    answers = [Answer(s.id, "blue" if s.id == "12" else targets_of(s)[0]) for s in both.samples()]
    figures = both.summarise(both.judge(both.samples(), answers))
    assert (figures["accuracy_percent"], figures["consistency_percent"]) == (100.0, 0.0)
    assert (figures["validity_percent"], figures["plausibility_percent"]) == (100.0, 0.0)
    assert all(score.counted for score in perfect(again(tiny, split="val_all", protocol="lmms_eval")))


def test_textvqa_takes_the_words_of_llavas_own_file_where_it_is_there(tmp_path):
    tiny = BENCHMARKS.get("textvqa").tiny(tmp_path)
    ending = "Answer the question using a single word or phrase."
    rows = [
        ("a1", f"What is the brand of this camera?\nReference OCR token: Pire\n{ending}"),
        ("b2", f"What NUMBER is on the shirt?\n{ending}"),
        ("c3", f"Who made it?\nReference OCR token: \n{ending}"),
    ]
    lines = [
        json.dumps({"question_id": name, "image": f"{name}.jpg", "text": text, "category": "default"})
        for name, text in rows
    ]
    (tmp_path / "llava_textvqa_val_v051_ocr.jsonl").write_text("\n".join(lines), encoding="utf-8")
    samples = again(tiny).samples()
    assert [s.turns[-1].text for s in samples if not s.defect] == [text for _, text in rows]
    assert ["about picture 'a1'" in sample.defect for sample in samples] == [False, True, False, False]
    (tmp_path / "llava_textvqa_val_v051_ocr.jsonl").unlink()
    (tmp_path / "TextVQA_Rosetta_OCR_v0.2_val.json").unlink()
    with pytest.raises(InputError, match=r"TextVQA_Rosetta_OCR.*Set `ocr` to false"):
        again(tiny).samples()


def test_the_letters_of_a_diagram_are_drawn_left_out_or_ready(tmp_path):
    tiny = BENCHMARKS.get("ai2d").tiny(tmp_path)
    plain, lettered = (sample.images[0].open() for sample in tiny.samples()[:2])
    assert plain.tobytes() == Image.open(tmp_path / "images" / "7.png").tobytes()
    changed = [x for x in range(32) if plain.getpixel((x, 10)) != lettered.getpixel((x, 10))]
    assert (changed[0], changed[-1]) == (4, 14)
    assert (255, 255, 255) in {lettered.getpixel((x, 5)) for x in changed}
    assert min(sum(lettered.getpixel((x, y))) for x in range(5, 14) for y in range(5, 16)) < 255
    without = again(tiny, letters="none").samples()[1].images[0].open()
    assert without.tobytes() == plain.tobytes()
    shutil.copytree(tmp_path / "images", tmp_path / "abc_images")
    assert again(tiny).samples()[1].images[0].open().tobytes() == plain.tobytes()
    shutil.rmtree(tmp_path / "abc_images")
    shutil.rmtree(tmp_path / "annotations")
    assert [bool(sample.defect) for sample in again(tiny).samples()] == [False, True] * 2


WORD = "Answer the question using a single word or phrase."
TEN = ["go"] * 10
TABLES = {
    "vqav2": (
        "data/validation-00000-of-00001.parquet",
        {
            "question_id": 7,
            "image_id": 1,
            "question": "Where?",
            "question_type": "where",
            "answer_type": "other",
            "answers": [{"answer": "go", "answer_confidence": "yes", "answer_id": n} for n in range(10)],
        },
        ("7", f"Where?\n{WORD}", ("go",), "other"),
    ),
    "vizwiz": (
        "data/val-00000-of-00001.parquet",
        {"question_id": "VizWiz_val_0.jpg", "question": "Where?", "answers": TEN, "category": "other"},
        (
            "VizWiz_val_0.jpg",
            f"Where?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n{WORD}",
            ("go",),
            "other",
        ),
    ),
    "textvqa": (
        "data/validation-00000-of-00001.parquet",
        {"question_id": 7, "image_id": "a", "question": "where?", "answers": TEN, "ocr_tokens": ["GO"]},
        ("7", f"Where?\nReference OCR token: GO\n{WORD}", ("go",), ""),
    ),
    "ocrbench": (
        "data/test-00000-of-00001.parquet",
        {
            "dataset": "svt",
            "question": "where?",
            "question_type": "Regular Text Recognition",
            "answer": ["go"],
        },
        ("0", "where?", ("go",), "Regular Text Recognition"),
    ),
    "chartqa": (
        "data/test-00000-of-00001.parquet",
        {"type": "human_test", "question": "Where?", "answer": "go"},
        ("0", "Where?\nAnswer the question with a single word.", ("go",), "human"),
    ),
    "docvqa": (
        "DocVQA/validation-00000-of-00001.parquet",
        {"questionId": "7", "question": "Where?", "question_types": ["form"], "docId": 4, "answers": ["go"]},
        ("7", f"Where?\n{WORD}", ("go",), "form"),
    ),
    "infovqa": (
        "InfographicVQA/validation-00000-of-00001.parquet",
        {"questionId": "7", "question": "Where?", "answer_type": ["non-span"], "answers": ["go"]},
        ("7", f"Where?\n{WORD}", ("go",), "non-span"),
    ),
    "ai2d": (
        "data/test-00000-of-00001.parquet",
        {"question": "Where?", "options": ["stay", "go"], "answer": "1"},
        (
            "0",
            "Where?\nA. stay\nB. go\nAnswer with the option's letter from the given choices directly.",
            ("B",),
            "",
        ),
    ),
}
"""A benchmark's published table: its file, a row, and id, text, targets and task of the question."""


@pytest.fixture
def stored(tmp_path):
    """Write one row of a table; a picture goes into its column ``image``."""
    pa = pytest.importorskip("pyarrow", reason="a table needs the extra `data`")
    import pyarrow.parquet as pq

    draw(tmp_path, "shown.png")
    picture = {"bytes": (tmp_path / "shown.png").read_bytes(), "path": "shown.png"}

    def write(file, row, shows=True):
        path = tmp_path / "table" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist([{**row, **({"image": picture} if shows else {})}]), path)
        return {"path": str(tmp_path / "table"), "cache": str(tmp_path / "cache")}

    return write


@pytest.mark.parametrize("name", TABLES)
def test_the_published_table_does_as_well(tmp_path, stored, name):
    file, row, (number, *asked) = TABLES[name]
    table = again(BENCHMARKS.get(name).tiny(tmp_path / "files"), **stored(file, row))
    (sample,) = table.samples()
    assert (sample.id, sample.defect) == (number, "")
    assert [sample.turns[-1].text, targets_of(sample), sample.task] == asked
    assert sample.images[0].open().size == (32, 24)
    assert share(table, perfect(table)) == 1.0


def test_gqa_joins_its_two_tables(tmp_path, stored):
    tiny = BENCHMARKS.get("gqa").tiny(tmp_path / "files")
    path = tmp_path / "files" / "testdev_balanced_questions.json"
    row = {"id": "11", **json.loads(path.read_text(encoding="utf-8"))["11"]}
    stored("testdev_balanced_instructions/testdev-00000-of-00001.parquet", row, shows=False)
    places = stored("testdev_balanced_images/testdev-00000-of-00001.parquet", {"id": row["imageId"]})
    (sample,) = again(tiny, **places).samples()
    assert (sample.id, sample.defect, sample.group, sample.task) == ("11", "", "1", "verify")
    assert sample.images[0].open().size == (32, 24)
    assert share(tiny, perfect(again(tiny, **places))) == 1.0


@pytest.mark.parametrize(
    ("name", "moves"),
    [
        ("chartqa", {"test": "ChartQA Dataset/test"}),
        (
            "docvqa",
            {"documents": "spdocvqa_images", "val_v1.0_withQT.json": "spdocvqa_qas/val_v1.0_withQT.json"},
        ),
        ("docvqa", {"documents": "val/documents", "val_v1.0_withQT.json": "val/val_v1.0.json"}),
        ("infovqa", {"infographicsvqa_images": "images"}),
        ("ocrbench", {"OCRBench.json": "OCRBench/OCRBench.json"}),
        ("ai2d", {"images": "ai2d/images", "questions": "ai2d/questions", "annotations": "ai2d/annotations"}),
    ],
)
def test_other_places_of_the_same_files_are_known(tmp_path, name, moves):
    tiny = BENCHMARKS.get(name).tiny(tmp_path)
    before = [(s.id, s.turns[-1].text, s.images[0].open().tobytes()) for s in tiny.samples()]
    for source, target in moves.items():
        (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / source).rename(tmp_path / target)
    moved = [(s.id, s.turns[-1].text, s.images[0].open().tobytes()) for s in again(tiny).samples()]
    assert moved == before


def test_answers_that_score_highest_are_the_targets():
    vqav2, textvqa = SCORERS.get("vqav2")(), SCORERS.get("textvqa")()
    assert best_answers(vqav2, "vqaeval_official", ["2"] * 5 + ["two"] * 4 + ["3"]) == ["2", "two"]
    assert best_answers(vqav2, "vqaeval_official", ["cat", "dog"] * 3 + list("cdef")) == ["cat", "dog"]
    assert best_answers(vqav2, "llava_convert_then_vqaeval", ["Yes"] * 10) == ["Yes"]
    assert best_answers(textvqa, "m4c_evaluator", ["go"] * 2 + [f"x{n}" for n in range(8)]) == ["go"]
