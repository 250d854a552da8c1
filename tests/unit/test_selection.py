"""Rows of one file of conversations divided among tasks, as published mixtures are."""

import json

import pytest

from vlmix.core.errors import InputError, RecipeError
from vlmix.core.settings import read_settings
from vlmix.data.sources.llava_json import LlavaJson, LlavaJsonSettings

OKVQA = {"folders": ["coco/"], "says": "single word or phrase", "listed": "okvqa.txt"}
OPTIONS = {"folders": ["coco/"], "says": r"\nA\. .*\nB\. "}
BOXES = {"folders": ["coco/"], "says": "bounding box|region"}
ROWS = {
    "first": ("coco/1.jpg", "Describe it."),
    "second": ("coco/2.jpg", "Where does it stand?"),
    "chat": (None, "Write a poem."),
    "gqa": ("gqa/1.jpg", "Is it red?\nAnswer the question using a single word or phrase."),
    "okvqa": ("coco/7.jpg", "Which breed?\nAnswer the question using a single word or phrase."),
    "vqa": ("coco/8.jpg", "What colour?\nAnswer the question using a single word or phrase."),
    "aokvqa": ("coco/8.jpg", "Why?\nA. one\nB. two\nAnswer with the option's letter."),
    "refcoco": ("coco/9.jpg", "Give the bounding box coordinate of: a cat"),
}


@pytest.fixture
def folder(tmp_path):
    rows = [
        {
            "id": name,
            **({"image": image} if image else {}),
            "conversations": [
                {"from": "human", "value": ("<image>\n" if image else "") + text},
                {"from": "gpt", "value": "yes"},
            ],
        }
        for name, (image, text) in ROWS.items()
    ]
    broken = json.dumps(rows)[:-1] + ', {"id": }]'
    (tmp_path / "rows.json").write_text(broken)
    (tmp_path / "okvqa.txt").write_text("7\n\n3\n")
    for image in {image for image, _ in ROWS.values() if image}:
        (tmp_path / image).parent.mkdir(exist_ok=True)
        (tmp_path / image).touch()
    return tmp_path


def names(folder, **select):
    settings = read_settings(LlavaJsonSettings, {"path": folder / "rows.json", "select": select})
    source = LlavaJson(settings)
    found = [sample.id for sample in source]
    assert [source.line(i) for i in range(len(source))] == [1] * len(source)
    return [name.partition("#")[0] for name in found], [int(name.partition("#")[2]) for name in found]


def test_each_rule_finds_its_rows_and_together_they_are_all(folder):
    listed = {**OKVQA, "listed": str(folder / "okvqa.txt")}
    rules = {
        "first second": {"last": 2},
        "chat": {"pictures": False},
        "gqa": {"folders": ["gqa/", "vg/"]},
        "okvqa": {**listed, "first": 3},
        "aokvqa": OPTIONS,
        "refcoco": BOXES,
        "vqa": {"folders": ["coco/"], "unless": [{"last": 2}, listed, OPTIONS, BOXES]},
    }
    found = {rule: names(folder, **select) for rule, select in rules.items()}
    assert {rule: " ".join(rows) for rule, (rows, _) in found.items()} == {rule: rule for rule in rules}
    assert sorted(place for _, places in found.values() for place in places) == [*range(1, 9)]


def test_a_row_that_is_not_json_is_found_by_its_place_alone(folder):
    source = LlavaJson(
        read_settings(LlavaJsonSettings, {"path": folder / "rows.json", "select": {"first": 8}})
    )
    assert len(source) == 2
    assert len(names(folder, first=8, pictures=True)[0]) == 1


def test_wrong_choices_are_refused(folder):
    with pytest.raises(RecipeError, match=r"select\.says: .*not a regular expression"):
        names(folder, says="(")
    with pytest.raises(InputError, match=r"select\.listed: .*none\.txt"):
        names(folder, listed=str(folder / "none.txt"))
