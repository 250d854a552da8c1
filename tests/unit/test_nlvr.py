"""NLVR from a folder and from a tar: rows, groups, bad records, and the official scores."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmix.core.errors import InputError, RecipeError, SampleError
from vlmix.core.parts import SOURCES, read_part
from vlmix.core.sample import Answer, Sample, Score
from vlmix.data.boxes.published import write_tiny_split
from vlmix.data.sources.nlvr import Nlvr, NlvrSettings
from vlmix.evals.benchmarks.nlvr import NlvrBenchmark, NlvrBenchmarkSettings

SHARED = Path(__file__).parents[3] / "shared"


def pixels(sample: Sample) -> list[np.ndarray]:
    return [np.asarray(image.open()) for image in sample.images]


def packed(folder: Path, tar: Path) -> Path:
    with tarfile.open(tar, "w") as file:
        file.add(folder / "dev", arcname="nlvr/dev")
    return tar


def test_folder_and_tar_give_the_same_rows(tmp_path: Path) -> None:
    settings = Nlvr.tiny(tmp_path / "nlvr")
    folder = Nlvr(settings)
    tar = Nlvr(settings.model_copy(update={"path": packed(settings.path, tmp_path / "dev.tar")}))
    assert len(folder) == len(tar) == 24
    for one, other in zip(folder, tar, strict=True):
        assert (one.id, one.turns[1], one.target, one.group) == (
            other.id,
            other.turns[1],
            other.target,
            other.group,
        )
        assert all(np.array_equal(a, b) for a, b in zip(pixels(one), pixels(other), strict=True))
    first = folder[1]
    assert (first.id, first.group, first.target, folder.line(23)) == ("dev-0-0-1", "0", "false", 4)
    assert [image.shape for image in pixels(first)] == [(100, 100, 3)] * 3


def test_orders_hold_the_same_boxes(tmp_path: Path) -> None:
    settings = Nlvr.tiny(tmp_path)
    orders = [[box.tobytes() for box in pixels(sample)] for sample in list(Nlvr(settings))[:6]]
    assert len({tuple(order) for order in orders}) == 6
    assert len({tuple(sorted(order)) for order in orders}) == 1
    whole = Nlvr(settings.model_copy(update={"boxes": False, "permutations": 1}))
    assert [image.shape for image in pixels(whole[0])] == [(100, 400, 3)]
    assert len(whole) == 4


def test_mirrored_rows_flip_the_boxes(tmp_path: Path) -> None:
    settings = Nlvr.tiny(tmp_path)
    rows = list(Nlvr(settings.model_copy(update={"mirror": True})))
    assert len(rows) == 48
    straight, flipped = pixels(rows[24]), pixels(rows[25])
    assert all(np.array_equal(a, b[:, ::-1]) for a, b in zip(straight, flipped[::-1], strict=True))
    file = settings.path / "dev" / "dev.json"
    file.write_text(file.read_text().replace("a black circle", "an item touching the right wall"))
    assert len(Nlvr(settings.model_copy(update={"mirror": True}))) == 36


def test_shared_sentences_can_be_left_out(tmp_path: Path) -> None:
    settings = Nlvr.tiny(tmp_path)
    write_tiny_split(tmp_path, "hidden")
    file = tmp_path / "hidden" / "hidden.json"
    kept = [line for line in file.read_text().splitlines() if "tower" in line]
    file.write_text(
        "\n".join(kept).replace("There is a tower with two blocks", "there is a Tower with two blocks.")
    )
    rows = Nlvr(settings.model_copy(update={"unlike": tmp_path}))
    assert {sample.group for sample in rows} == {"1"}
    assert rows.line(0) == 3


def test_bad_records_name_line_and_reason(tmp_path: Path) -> None:
    settings = Nlvr.tiny(tmp_path)
    file = tmp_path / "dev" / "dev.json"
    lines = file.read_text().splitlines()
    lines[0] = "{broken"
    lines[1] = lines[1].replace('"true"', '"maybe"')
    lines[2] = lines[2].replace('"1-0"', '"../../x"')
    file.write_text("\n".join(lines))
    (tmp_path / "dev" / "images" / "0" / "dev-1-1-0.png").unlink()
    Image.new("RGB", (10, 10)).save(tmp_path / "dev" / "images" / "0" / "dev-1-1-1.png")
    source = Nlvr(settings)
    expected = {0: "not valid JSON", 6: "'maybe'", 12: "identifier", 18: "no picture", 19: "10 x 10"}
    for index, reason in expected.items():
        with pytest.raises(SampleError, match=reason) as caught:
            source[index]
        assert caught.value.line == index // 6 + 1
    assert source[20].id == "dev-1-1-2"


def test_only_regular_members_of_a_tar_count(tmp_path: Path) -> None:
    settings = Nlvr.tiny(tmp_path / "nlvr")
    secret = tmp_path / "secret.png"
    Image.new("RGB", (400, 100)).save(secret)
    with tarfile.open(tmp_path / "bad.tar", "w") as file:
        link = tarfile.TarInfo("../../dev-0-0-0.png")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        file.addfile(link)
        file.add(settings.path / "dev" / "dev.json", arcname="/nlvr/dev/dev.json")
    source = Nlvr(settings.model_copy(update={"path": tmp_path / "bad.tar"}))
    with pytest.raises(SampleError, match=r"no picture called dev-0-0-0\.png"):
        source[0]
    assert not (tmp_path / "dev-0-0-0.png").exists()


@pytest.mark.parametrize("content", [None, b"", b"not a tar", "empty"])
def test_absent_data_says_where_to_get_it(tmp_path: Path, content: bytes | str | None) -> None:
    path = tmp_path / "nlvr_dev.tar"
    if content == "empty":
        with tarfile.open(path, "w") as file:
            file.addfile(tarfile.TarInfo("readme"), io.BytesIO())
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"clic-lab/nlvr.*data/nlvr"):
        len(Nlvr(NlvrSettings(path=path, split="dev")))


def test_a_question_must_hold_the_sentence(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="sentence"):
        read_part(
            SOURCES, {"kind": "nlvr", "path": str(tmp_path), "split": "dev", "question": "True or false?"}
        )
    settings = Nlvr.tiny(tmp_path).model_copy(update={"question": "True or false: {sentence}"})
    assert Nlvr(settings)[0].turns[0].text == "True or false: There is a tower with two blocks"


@pytest.mark.golden
def test_scores_are_the_official_ones(tmp_path: Path) -> None:
    file = SHARED / "metrics" / "nlvr.json"
    if not file.exists():
        pytest.skip("needs shared/metrics/nlvr.json")
    benchmark, scores = NlvrBenchmark.tiny(tmp_path), list[Score]()
    golden = json.loads(file.read_text())["samples"]
    for one in golden:
        sample = Sample(one["id"], (), target=one["gold"], group=one["example"].partition("-")[0])
        scores.append(benchmark.score(sample, Answer(one["id"], one["answer"])))
        assert scores[-1].value == one["score"], one
    wrong = {one["example"].partition("-")[0] for one in golden if not one["score"]}
    groups = Counter(score.group for score in scores)
    figures = benchmark.summarise(scores)
    assert figures["accuracy"] == pytest.approx(sum(one["score"] for one in golden) / len(golden))
    assert figures["consistency"] == pytest.approx(1 - len(wrong) / len(groups))
    assert 0 < figures["consistency"] < figures["accuracy"] < 1


def test_failed_answers_stay_in_the_denominator(tmp_path: Path) -> None:
    benchmark = NlvrBenchmark.tiny(tmp_path)
    samples = benchmark.samples()
    scores = [benchmark.score(one, Answer(one.id, str(one.target))) for one in samples]
    assert benchmark.summarise(scores) == {"accuracy": 1.0, "consistency": 1.0}
    scores[0] = benchmark.score(
        samples[0], Answer(samples[0].id, str(samples[0].target), error="out of time")
    )
    assert benchmark.summarise(scores) == {"accuracy": 23 / 24, "consistency": 0.5}


@pytest.mark.slow
@pytest.mark.parametrize("split", ["dev", "hidden"])
def test_the_published_splits_are_whole(split: str) -> None:
    tar = SHARED / "data" / "nlvr" / f"nlvr_{split}.tar"
    if not tar.exists():
        pytest.skip(f"needs shared/data/nlvr/nlvr_{split}.tar")
    samples = NlvrBenchmark(NlvrBenchmarkSettings(path=tar, split=split)).samples()
    records, sentences = {"dev": (989, 267), "hidden": (985, 266)}[split]
    assert (len(samples), len({sample.group for sample in samples})) == (6 * records, sentences)
    majority = sum(sample.target == "true" for sample in samples) / len(samples)
    assert majority == pytest.approx({"dev": 547 / 989, "hidden": 546 / 985}[split])


@pytest.mark.slow
def test_no_sentence_is_shared_between_training_and_judging() -> None:
    folder = SHARED / "data" / "nlvr"
    if not folder.exists():
        pytest.skip("needs shared/data/nlvr")
    dev = NlvrSettings(path=folder / "nlvr_dev.tar", split="dev", permutations=1)
    kept = Nlvr(dev.model_copy(update={"unlike": folder / "nlvr_hidden.tar"}))
    judged = NlvrBenchmark(NlvrBenchmarkSettings(path=folder / "nlvr_hidden.tar", permutations=1)).samples()
    theirs = {sample.turns[0].text.lower().strip(" .") for sample in judged}
    ours = {sample.turns[0].text.lower().strip(" .") for sample in kept}
    assert 0 < len(kept) < len(Nlvr(dev))
    assert not ours & theirs
