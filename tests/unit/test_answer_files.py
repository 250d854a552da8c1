"""Answers that other scripts left in a file: judged as they are, and nothing is lost or counted twice."""

import json
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import pytest

from vlmix.cli.main import app
from vlmix.core.errors import InputError
from vlmix.evals.answer_files import read_answers
from vlmix.evals.benchmarks.synth_qa import SynthQa, SynthQaSettings
from vlmix.evals.controls import targets_of

ASKED = ["--benchmark", "synth_qa", "--set", "size=18"]


def run(*arguments):
    told = StringIO()
    with redirect_stderr(told), redirect_stdout(StringIO()):
        app(["eval", *map(str, arguments)], standalone_mode=False)
    return told.getvalue()


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_file_of_llavas_scripts_is_judged_without_a_model(tmp_path):
    samples = SynthQa(SynthQaSettings(size=18)).samples()
    right = [
        {"question_id": sample.id, "prompt": "?", "text": targets_of(sample)[0], "answer_id": "x"}
        for sample in samples
    ]
    right[3]["text"] = "nonsense"
    path = lines(tmp_path / "answers.jsonl", [*right[:-1], {"question_id": "stranger", "text": "yes"}])
    told = run("--from", path, *ASKED, "--out", tmp_path / "report")
    found = json.loads((tmp_path / "report" / "results.json").read_text())
    result = found["results"][0]
    assert result["figures"]["accuracy"] == pytest.approx(16 / 18, abs=1e-6)
    assert (result["n"], result["failed"], result["blind"]) == (18, 1, None)
    assert f"1 of 18 questions have no answer in answers.jsonl and count as wrong: {samples[-1].id}" in told
    assert "1 answers in answers.jsonl belong to no question and count for nothing: stranger" in told
    assert sum("answers.jsonl" in note for note in found["notes"]) == 3
    ours = read_answers(tmp_path / "report" / "answers.jsonl")
    assert ours.texts == {row["question_id"]: row["text"] for row in right[:-1]}, (
        "a report can be judged again"
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"question_id": 1, "text": "a"}\n{"question_id": "1", "text": "b"}', "rows 1 and 2 both answer"),
        ('{"question_id": 1, "text": "a"}\n{"question_id": 2, "te', "row 2 is no JSON"),
        ('{"id": 1, "text": "a"}', "none of the fields question_id, sample_id"),
        ('{"question_id": 1}', "none of the fields text, answer"),
        ('{"question_id": 1, "text": null}', "the answer text"),
        ('{"question_id": true, "text": "a"}', "the id must be"),
        ("[1]", "row 1 is int"),
        ("\n", "holds no answer"),
    ],
)
def test_a_file_that_cannot_be_trusted_is_refused_and_nothing_is_written(tmp_path, content, says):
    path = tmp_path / "answers.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=says):
        run("--from", path, *ASKED, "--out", tmp_path / "report")
    assert [each.name for each in tmp_path.iterdir()] == ["answers.jsonl"]


def test_lists_and_whole_numbers_are_read(tmp_path):
    path = tmp_path / "answers.json"
    path.write_text('[{"question_id": 7, "text": "a"}, {"sample_id": "b", "answer": "c"}]', encoding="utf-8")
    assert read_answers(path).texts == {"7": "a", "b": "c"}
    with pytest.raises(InputError, match="cannot be read"):
        read_answers(tmp_path / "absent")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([*ASKED], "name a MODEL to judge, or a file"),
        (["here", "--from", "a.jsonl", *ASKED], "not both"),
        (["http://127.0.0.1:9/v1", *ASKED, "--out", "x"], "--model-name"),
        (["http://127.0.0.1:9/v1", "--model-name", "m", *ASKED], "--out DIR"),
        (["here", "--model-name", "m", *ASKED], "MODEL is a folder"),
        (["http://127.0.0.1:9/v1", "--model-name", "m", *ASKED, "--out", "x", "--choose", "luck"], "luck"),
        (["here", *ASKED, "--out", "x"], "no such folder"),
        (["--from", "a.jsonl", "--benchmark", "perplexity", "--out", "x"], "a.jsonl cannot be read"),
    ],
)
def test_what_contradicts_itself_is_refused_and_nothing_is_written(tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=says):
        run(*arguments)
    assert list(tmp_path.iterdir()) == []
