"""The forgetting matrix, its two means, and the paper's own figures put through them."""

import json

import pytest
from PIL import Image

from vlmix.core.errors import InputError
from vlmix.evals.forgetting import (
    FLOOR,
    ForgettingMatrix,
    arithmetic_mean,
    forgetting,
    harmonic_mean,
    read_matrix,
    relative_forgetting,
    write_forgetting,
)

ROUNDED = pytest.approx  # the paper prints two decimals, so sums of two of them are within 0.01
TASKS = {"language": ("lambada", "arc"), "vqa": ("vqav2", "gqa"), "ocr": ("textvqa",)}
POINTS = (
    {"lambada": 60.0, "arc": 30.0, "vqav2": 0.0, "gqa": 0.0, "textvqa": 0.0},
    {"lambada": 30.0, "arc": 30.0, "vqav2": 60.0, "gqa": 40.0, "textvqa": 2.0},
    {"lambada": 20.0, "arc": 30.0, "vqav2": 30.0, "gqa": 0.0, "textvqa": 50.0},
)
# arXiv:2410.19925, Pythia-160M on two tasks: NL accuracy after, and the Delta printed beside it.
TWO_TASKS = {"naive": (24.78, 7.83), "lora": (30.92, 1.69), "msgm": (29.93, 2.68), "soft": (29.78, 2.83)}
BASE_160M = 32.61
# Naive fine-tuning, Delta on NLG and NLU of nine language models, and the means printed below them.
NLG = (12.01, 8.62, 4.95, 8.07, 9.18, -1.01, 4.39, 2.04, -0.43)
NLU = (0.94, -1.19, -1.63, 0.55, 1.74, -1.20, 2.60, -0.98, -2.15)


def matrix():
    return ForgettingMatrix(TASKS, POINTS)


def test_the_harmonic_mean_raises_zeros_to_the_papers_floor():
    assert FLOOR == 0.1
    assert harmonic_mean([60, 30]) == pytest.approx(40)
    assert harmonic_mean([0, 50]) == pytest.approx(2 / (10 + 0.02))
    assert arithmetic_mean([0, 50]) == 25
    assert harmonic_mean([0.05, 0.0]) == pytest.approx(0.1)
    for wrong in ([], [-1.0], [101.0]):
        with pytest.raises(InputError):
            harmonic_mean(wrong)
    with pytest.raises(InputError, match="floor"):
        harmonic_mean([1.0], floor=0)


@pytest.mark.parametrize("method", TWO_TASKS)
def test_deltas_of_table_4_follow_from_its_accuracies(method):
    after, delta = TWO_TASKS[method]
    assert forgetting(BASE_160M, after) == ROUNDED(delta, abs=0.01)


def test_means_over_language_models_are_the_papers():
    for printed, deltas in ((5.31, NLG), (-0.15, NLU)):
        assert sum(deltas) / len(deltas) == ROUNDED(printed, abs=0.01)


def test_a_harmonic_mean_with_one_benchmark_at_zero_is_what_the_paper_prints():
    """Naive fine-tuning on the sequence ends at 0.48 over five benchmarks whose ordinary mean is 18.4.

    Cells are not at hand; both figures together need one at the floor and none of the others near it.
    """
    assert harmonic_mean([0, *[92 / 4] * 4]) == pytest.approx(0.49, abs=0.01)
    assert harmonic_mean([1, *[91 / 4] * 4]) > 4, "without a zero it would be ten times as much"
    assert harmonic_mean([0, 0, *[92 / 3] * 3]) < 0.25
    # Soft targets after the second task: 0.16 takes three of the five at zero.
    assert harmonic_mean([0, 0, 0, 40, 40]) == pytest.approx(0.16, abs=0.01)


def test_the_share_that_is_lost_follows_from_table_4():
    """Pythia-160M: a quarter of what it could do, or a twentieth with LoRA."""
    lost = {method: relative_forgetting(BASE_160M, after) for method, (after, _) in TWO_TASKS.items()}
    assert lost["naive"] == pytest.approx(100 * 7.83 / 32.61, abs=0.05)
    assert min(lost, key=lambda method: lost[method]) == "lora"


def test_omega_delta_and_what_was_lost_since_are_as_defined():
    found = matrix()
    assert found.tasks == ("language", "vqa", "ocr")
    assert found.omega("language", 1) == pytest.approx(40)
    assert found.delta("language", 3) == pytest.approx(40 - 24)
    assert found.delta("language", 3, "arithmetic") == pytest.approx(45 - 25)
    assert found.relative("language", 3) == pytest.approx(40)
    assert found.lost("vqa", 3, "arithmetic") == pytest.approx(50 - 15)
    assert found.learnt(2) == pytest.approx(48), "what was not learnt yet does not count"
    assert found.learnt(3) == pytest.approx(harmonic_mean([30, 0, 50]))
    assert found.delta("vqa", 2) < 0, "gained since before the first task"
    assert relative_forgetting(50, 60) == -20
    with pytest.raises(InputError, match="no meaning"):
        relative_forgetting(0, 1)


def test_rows_must_be_whole_and_asked_for_in_range():
    with pytest.raises(InputError, match="arc"):
        ForgettingMatrix(TASKS, ({"lambada": 1.0, "vqav2": 0.0, "gqa": 0.0, "textvqa": 0.0},))
    with pytest.raises(InputError, match="4 rows"):
        ForgettingMatrix(TASKS, POINTS[:1] * 4)
    with pytest.raises(InputError, match="after task 0"):
        matrix().omega("language", 0)
    with pytest.raises(InputError, match="no points"):
        matrix().learnt(1)


def test_the_matrix_is_written_as_numbers_table_and_picture(tmp_path):
    write_forgetting(tmp_path, matrix())
    found = json.loads((tmp_path / "forgetting.json").read_text())
    assert found["means"]["harmonic"]["omega"]["language"] == pytest.approx([40, 30, 24])
    assert found["means"]["arithmetic"]["delta"] == pytest.approx([0, 15, 20])
    assert len(found["means"]["harmonic"]["learnt"]) == 2
    table = matrix().table()
    assert table[0][0] == "after"
    assert table[2] == ["vqa", "30.0", "48.0", "2.0", "48.0", "10.0"]
    picture = Image.open(tmp_path / "forgetting.png")
    assert picture.width > 200
    assert len(set(picture.convert("L").resize((40, 40)).tobytes())) > 5


def test_a_matrix_measured_elsewhere_is_read_from_csv_and_json(tmp_path):
    write_forgetting(tmp_path, matrix())
    assert read_matrix(tmp_path / "forgetting.json").table() == matrix().table()
    columns = [f"{task}/{name}" for task, names in TASKS.items() for name in names]
    rows = [[task, *POINTS[k].values()] for k, task in enumerate(TASKS)]
    lines = [",".join(map(str, row)) for row in (["after", *columns], *rows)]
    path = tmp_path / "cells.csv"
    path.write_text("\n".join(lines) + "\n")
    assert read_matrix(path).table("arithmetic") == matrix().table("arithmetic")
    path.write_text("\n".join([lines[0], lines[2]]))
    with pytest.raises(InputError, match=r"cells\.csv.*in this order"):
        read_matrix(path)
    for text in ("", "x,y\n", lines[0] + "\nlanguage,1\n", lines[0] + "\nlanguage" + ",a" * 5):
        path.write_text(text)
        with pytest.raises(InputError, match=r"cells\.csv"):
            read_matrix(path)
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(InputError, match=r"bad\.json"):
        read_matrix(tmp_path / "bad.json")
