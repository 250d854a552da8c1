"""Benchmarks with options, or with yes and no, from their files: what is broken or gone counts as wrong."""

import csv
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.unit.test_shards import png
from vlmix.core.errors import ImageError, InputError, RecipeError
from vlmix.core.parts import BENCHMARKS, read_part
from vlmix.core.sample import Answer
from vlmix.evals.controls import targets_of
from vlmix.evals.responder import CannedResponder
from vlmix.evals.run import evaluate

MME = "MME_Benchmark_release_version/MME_Benchmark"
SEED = "SEED-Bench-image"
TABLE = "mmbench_dev_20230712.tsv"
# The file and what is changed in it at its first place; where that line stands; what is said of it.
BROKEN = {
    "mathvista": ("testmini.json", '"the blue one"]', "7]", "testmini.json:1", "no list of options"),
    "mmbench": (TABLE, "sun\tA\t", "sun\tQ\t", f"{TABLE}:2", "no letter of 3 options"),
    "mme": (f"{MME}/existence/1.txt", "\tYes", "Yes", "existence/1.txt:1", "neither Yes nor No"),
    "pope": ("coco_pope_random.json", '"label": "yes"', '"label": 1', "coco_pope_random.json:1", "neither"),
    "scienceqa_img": ("problems.json", '"answer": 0', '"answer": 9', "problems.json:3", "no place among 2"),
    "seedbench_image": ("SEED-Bench.json", '"answer": "A"', '"answer": "F"', "questions[0]", "no letter"),
}
# A picture of the tiny set, and how many questions are asked about it.
PICTURES = {
    "mathvista": ("images/1.jpg", 1),
    "mme": (f"{MME}/existence/1.png", 2),
    "pope": ("val2014/one.jpg", 6),
    "scienceqa_img": ("images/test/3/image.png", 1),
    "seedbench_image": (f"{SEED}/1_1", 2),
}
MOVED = {
    "mathvista": {"testmini.json": "data/testmini.json", "images": "data/images"},
    "mme": {MME: "."},
    "pope": {f"coco_pope_{name}.json": f"coco/coco_pope_{name}.json" for name in ("random", "popular")}
    | {"coco_pope_adversarial.json": "coco/coco_pope_adversarial.json"},
    "scienceqa_img": {"images/test": "test"},
}

# Where the published table lies in its folder.
TABLES = {
    "mathvista": "data/testmini-00000-of-00001.parquet",
    "mmbench": "en/dev-00000-of-00001.parquet",
    "mme": "data/test-00000-of-00001.parquet",
    "pope": "data/test-00000-of-00001.parquet",
    "scienceqa_img": "ScienceQA-IMG/test-00000-of-00001.parquet",
    "seedbench_image": "data/test-00000-of-00001.parquet",
}


class Looking:
    """Opens the pictures of each question, and gives the right answer where that worked."""

    def __init__(self, benchmark):
        self.right = {sample.id: targets_of(sample)[0] for sample in benchmark.samples() if sample.target}

    def respond(self, samples, decoding):
        for sample in samples:
            try:
                sizes = [image.open().size for image in sample.images]
                yield Answer(sample.id, self.right[sample.id], tokens=len(sizes))
            except ImageError as error:
                yield Answer(sample.id, "", error=str(error))


def looked(benchmark):
    return evaluate(Looking(benchmark), benchmark, blind=False)


def again(benchmark, **changed):
    """The same benchmark read once more, with other settings."""
    raw = {**benchmark.settings.model_dump(mode="json"), **changed}
    return type(benchmark)(read_part(BENCHMARKS, raw))


def tiny(name, folder):
    return BENCHMARKS.get(name).tiny(folder)


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("protocol", [0, -1], ids=["official", "other"])
def test_a_broken_line_is_listed_and_counts_as_wrong(tmp_path, name, protocol):
    file, old, new, place, reason = BROKEN[name]
    benchmark = again(tiny(name, tmp_path))
    benchmark = again(benchmark, protocol=list(benchmark.rule.protocols)[protocol])
    text = (tmp_path / file).read_text(encoding="utf-8")
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new, 1), encoding="utf-8")
    found = [sample for sample in benchmark.samples() if sample.defect]
    assert [sample.id.endswith(place) and reason in sample.defect for sample in found] == [True]
    result = looked(benchmark)
    assert result.model.failed == 1
    assert result.model.figures[benchmark.headline] < looked_whole(name, tmp_path, benchmark)


def looked_whole(name, folder, benchmark):
    """The headline of the whole tiny set by the same protocol."""
    (folder / "whole").mkdir()
    other = again(tiny(name, folder / "whole"), protocol=benchmark.protocol)
    return looked(other).model.figures[benchmark.headline]


@pytest.mark.parametrize("name", PICTURES)
def test_questions_about_a_picture_that_is_gone_fail_and_count(tmp_path, name):
    file, count = PICTURES[name]
    benchmark = tiny(name, tmp_path)
    best = looked(benchmark).model.figures[benchmark.headline]
    (tmp_path / file).unlink()
    benchmark = again(benchmark)
    result = looked(benchmark)
    assert result.model.failed == count == sum(score.value == 0 for score in result.model.scores)
    assert result.model.figures[benchmark.headline] < best


@pytest.mark.parametrize("name", MOVED)
def test_other_places_that_people_unpack_to_give_the_same_questions(tmp_path, name):
    benchmark = tiny(name, tmp_path)
    before = benchmark.samples()
    for old, new in MOVED[name].items():
        (tmp_path / new).parent.mkdir(exist_ok=True)
        shutil.move(tmp_path / old, tmp_path / new)
    if (tmp_path / "images").is_dir() and name == "scienceqa_img":
        (tmp_path / "images").rmdir()
    after = again(benchmark).samples()
    assert [(sample.id, sample.turns[-1].text) for sample in after] == [
        (sample.id, sample.turns[-1].text) for sample in before
    ]
    assert all(image.open().size for sample in after for image in sample.images)


def mme_rows(folder):
    for file in sorted((folder / MME).rglob("*.txt")):
        task = file.relative_to(folder / MME).parts[0]
        for line in file.read_text(encoding="utf-8").split("\n")[:2]:
            question, answer = line.split("\t")
            named = {"question_id": f"{task}/{file.stem}.png", "category": task}
            yield {**named, "question": question, "answer": answer}


def pope_rows(folder):
    for kind in ("random", "popular", "adversarial"):
        for line in (folder / f"coco_pope_{kind}.json").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            named = {"question_id": str(row["question_id"]), "image_source": row["image"]}
            yield {**named, "question": row["text"], "answer": row["label"], "category": kind}


def mmbench_rows(folder):
    with (folder / TABLE).open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            wide = {"L2-category": row.pop("l2-category"), "index": int(row["index"])}
            yield {key: value or "nan" for key, value in row.items()} | wide


def values_of(name):
    def rows(folder):
        held = json.loads((folder / name).read_text(encoding="utf-8"))
        yield from held.get("questions", held.values())

    return rows


ROWS = {
    "mathvista": values_of("testmini.json"),
    "mmbench": mmbench_rows,
    "mme": mme_rows,
    "pope": pope_rows,
    "scienceqa_img": values_of("problems.json"),
    "seedbench_image": values_of("SEED-Bench.json"),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_table_of_hugging_face_asks_the_same_questions(tmp_path, name):
    whole, stored = tmp_path / "whole", tmp_path / "stored"
    whole.mkdir()
    benchmark = tiny(name, whole)
    column, cell = "decoded_image" if name == "mathvista" else "image", {"bytes": png("red"), "path": None}
    rows = [
        {
            **row,
            column: [cell] if name == "seedbench_image" else None if row.get("image", 1) is None else cell,
        }
        for row in ROWS[name](whole)
    ]
    (stored / TABLES[name]).parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), stored / TABLES[name])
    table = again(benchmark, path=str(stored), cache=str(tmp_path / "cache"))

    def asked(samples):
        return sorted((s.turns[-1].text, targets_of(s), s.options, s.meta.get("category")) for s in samples)

    assert asked(table.samples()) == asked(benchmark.samples())
    assert looked(table).model.figures == looked(benchmark).model.figures


@pytest.mark.parametrize("name", [*BROKEN, "mmmu"])
def test_files_that_are_not_there_are_named_with_where_they_are_had(tmp_path, name):
    whole, empty = tmp_path / "whole", tmp_path / "empty"
    whole.mkdir()
    empty.mkdir()
    with pytest.raises(InputError, match=r"there is no .*(repository|Hugging Face)") as raised:
        again(tiny(name, whole), path=str(empty)).samples()
    assert str(empty) in str(raised.value)


@pytest.mark.parametrize(
    ("name", "known"), [("mathvista", "testmini"), ("mmbench", "dev"), ("mmmu", "valid")]
)
def test_a_split_without_answers_says_which_has_them(tmp_path, name, known):
    with pytest.raises(RecipeError, match=f"'test' is no split whose answers are published; ask {known}"):
        again(tiny(name, tmp_path), split="test")


def test_mmbench_counts_a_question_once_and_right_only_in_every_rotation(tmp_path):
    benchmark = tiny("mmbench", tmp_path)
    answers = {sample.id: targets_of(sample)[0] for sample in benchmark.samples()}
    assert list(answers)[:4] == ["1", "1000001", "2000001", "2"], "a limit would cut questions apart"
    assert len(answers) == 9
    wrong = evaluate(CannedResponder({**answers, "1000002": "A"}), benchmark, blind=False)
    assert wrong.model.figures["dev.Overall"] == pytest.approx(2 / 3)
    assert sum(score.counted for score in wrong.model.scores) == 3
    vanilla = again(benchmark, protocol="vlmevalkit_vanilla_exact")
    alone = evaluate(CannedResponder({**answers, "1000002": "A"}), vanilla, blind=False)
    assert alone.model.figures["dev.Overall"] == pytest.approx(8 / 9)
    once = again(benchmark, rotations=False)
    assert [sample.id for sample in once.samples()] == ["1", "2", "3"]
    first, turned = (s for s in benchmark.samples() if s.id in {"3", "1000003"})
    assert first.images[0].digest() == turned.images[0].digest(), "a rotation names the row with its picture"
    assert (first.options, first.group, first.task) == (tuple("ABCD"), "3", "coarse_perception")


def test_a_picture_of_mmbench_that_is_none_fails_in_every_rotation_and_odd_rows_count(tmp_path):
    benchmark = tiny("mmbench", tmp_path)
    lines = (tmp_path / TABLE).read_text(encoding="utf-8").splitlines()
    image = lines[0].split("\t").index("image")
    cells = lines[1].split("\t")
    lines[1] = "\t".join([*cells[:image], "A" * 80, *cells[image + 1 :]])
    lines += ["4\ttoo\tmany" + "\tcells" * 20, "5\ttoo\tfew"]
    (tmp_path / TABLE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    result = looked(again(benchmark))
    assert result.model.failed == 3 + 2
    assert result.model.figures["dev.Overall"] == pytest.approx(2 / 5)


def test_mme_gives_points_for_pairs_and_its_other_half_alone(tmp_path):
    benchmark = tiny("mme", tmp_path)
    answers = {sample.id: targets_of(sample)[0] for sample in benchmark.samples()}
    half = evaluate(CannedResponder({**answers, "existence/2/2": "Yes"}), benchmark, blind=False)
    assert half.model.figures["Perception.existence"] == 75 + 50
    assert half.units["Perception.total"] == "points of 2000"
    cognition = again(benchmark, tasks=["code_reasoning"])
    assert (cognition.headline, len(cognition.samples())) == ("Cognition.total", 2)
    with pytest.raises(InputError, match="no folder OCR"):
        again(benchmark, tasks=["OCR"]).samples()


def test_mmmu_shows_the_pictures_that_are_named_and_refuses_rows_without_them(tmp_path):
    benchmark = tiny("mmmu", tmp_path)
    assert [len(sample.images) for sample in benchmark.samples()] == [1, 3, 1, 1, 1]
    assert [len(sample.images) for sample in again(benchmark, pictures="first").samples()] == [1] * 5
    assert [targets_of(sample) for sample in benchmark.samples()][-2:] == [("12", "twelve"), ("0.5",)]
    (file,) = (tmp_path / "Art").iterdir()
    table = pq.read_table(file).to_pylist()
    changed = [{**table[0], "answer": "Z"}, {**table[1], "image_2": None, "image_3": None}]
    shutil.rmtree(tmp_path / "cache")
    held = pq.read_table(file).schema
    pq.write_table(pq.read_table(file).from_pylist(changed, schema=held), file)
    defects = [sample.defect for sample in again(benchmark, cache=str(tmp_path / "other")).samples()]
    assert ["no letter of 2 options" in defects[0], "does not hold" in defects[1], *defects[2:]] == [
        True,
        True,
        *[""] * 3,
    ]


def test_seedbench_asks_about_pictures_only_and_names_kinds_of_questions(tmp_path):
    samples = tiny("seedbench_image", tmp_path).samples()
    assert [sample.id for sample in samples] == ["100", "101", "102", "104"]
    assert {sample.task for sample in samples} == {"Scene Understanding", "Instances Counting"}
    assert [sample.group for sample in samples][:2] == ["1_1", "1_1"]


def test_scienceqa_with_all_questions_reports_those_with_a_picture_beside_them(tmp_path):
    benchmark = again(tiny("scienceqa_img", tmp_path), pictured=False)
    answers = {s.id: targets_of(s)[0] if s.images else "none" for s in benchmark.samples()}
    figures = evaluate(CannedResponder(answers), benchmark, blind=False).model.figures
    assert (figures["acc_percent"], figures["IMG-Accuracy_percent"]) == (80.0, 100.0)
    held = json.loads((tmp_path / "pid_splits.json").read_text(encoding="utf-8"))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": [*held["test"], "77"]}), encoding="utf-8")
    assert [s.defect for s in again(benchmark).samples()][-1].startswith("problems.json:77: it is listed")
    with pytest.raises(InputError, match="lists no split 'minitest'"):
        again(benchmark, split="minitest").samples()
