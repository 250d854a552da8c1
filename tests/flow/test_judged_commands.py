"""Judges behind the commands: a real server, its cassette, and what is told where there is none."""

import json

import pytest
from typer.testing import CliRunner

from tests.judge_server import judging
from vlmix.cli.main import app
from vlmix.core.errors import InputError
from vlmix.core.parts import BENCHMARKS
from vlmix.evals.controls import targets_of

pytestmark = pytest.mark.flow
ROWS = [
    {"id": "one", "question": "What?", "capability": ["rec"], "gold": "a cat", "answer": "It is a cat."},
    {
        "id": "two",
        "question": "How many?",
        "capability": ["rec", "ocr"],
        "gold": "two<OR>2",
        "answer": "three",
    },
    {"id": "odd", "question": "Who?", "capability": ["rec"], "gold": "a dog", "answer": "nobody at all"},
    {"id": "bad", "question": "When?", "capability": ["ocr"], "gold": "now", "answer": "refused"},
    {"id": "mute", "question": "Why?", "capability": ["rec"], "gold": "so", "answer": None},
]


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("MARKER_KEY", "secret")


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def vlmix(*arguments):
    run = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "300"})
    if run.exception and not isinstance(run.exception, SystemExit):
        raise run.exception
    return run


def marks(prompt):
    """Marks by the answer in the table's last line; nonsense for one, a refusal for another."""
    said = {"It is a cat.": "1.0", "three": "0.2", "nobody at all": "excellent", "refused": 400}
    return next(said[answer] for answer in said if f"| {answer} |" in prompt)


def test_answers_are_marked_by_the_judge_and_what_it_does_not_mark_stays_counted(rows, tmp_path):
    cassette = tmp_path / "judge.jsonl"
    options = ("--judge-model", "marker", "--judge-key-variable", "MARKER_KEY")
    with judging(marks) as (url, seen):
        told = vlmix("score", "mmvet", rows, "--judge", url, "--judge", cassette, *options, "--json").stdout
    assert {headers["Authorization"] for headers, _ in seen} == {"Bearer secret"}
    assert "secret" not in told + cassette.read_text(encoding="utf-8")
    found = json.loads(told)
    assert (found["protocol"], found["mean"]) == ("gpt4", pytest.approx(1.2 / 5))
    assert "note" not in found
    assert found["counts"]["failed"] == 2
    assert found["counts"]["missing"] == 1
    assert [sample["score"] for sample in found["samples"]] == [1.0, 0.2, 0.0, 0.0, None]
    assert "excellent" in found["samples"][2]["parsed"]
    assert "HTTP 400" in found["samples"][3]["parsed"]
    assert found["summary"]["total_percent"] == 24.0
    again = json.loads(vlmix("score", "mmvet", rows, "--judge", cassette, *options[:2], "--json").stdout)
    assert again["summary"] == found["summary"]
    assert "holds no reply" in again["samples"][3]["parsed"]
    shown = vlmix("score", "mmvet", rows, "--judge", cassette, *options[:2]).stdout
    assert "5 rows, 4 scored, 1 unscored, 1 missing, 2 failed" in shown
    assert "no judge" not in shown


def test_without_a_judge_the_free_protocol_is_taken_and_said(rows):
    shown = vlmix("score", "mmvet", rows).stdout
    assert "protocol  elements" in shown
    assert "no judge is named" in shown
    assert "'gpt4'" in shown
    found = json.loads(vlmix("score", "mmvet", rows, "--json").stdout)
    assert "no judge" in found["note"]
    assert found["mean"] == 1 / 5
    assert "note" not in json.loads(vlmix("score", "mmvet", rows, "--protocol", "elements", "--json").stdout)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--judge", "http://localhost:1"], "--judge-model"),
        (["--judge-model", "m"], "say with --judge where"),
        (["--judge", "a", "--judge", "b", "--judge-model", "m"], "one server and one cassette"),
        (["--judge", "none.jsonl", "--judge-model", "m"], "no such cassette"),
        (
            ["--judge", "http://localhost:1", "--judge-model", "m", "--protocol", "elements"],
            "no judge has a part",
        ),
        (["--judge-rules", "words.txt"], "there is none"),
        (["--protocol", "gpt4"], "needs a judging model"),
    ],
)
def test_options_that_make_no_judge_are_refused(rows, options, told):
    with pytest.raises(InputError, match=told):
        vlmix("score", "mmvet", rows, *options)


def test_a_rule_without_a_judge_refuses_one(rows):
    with pytest.raises(InputError, match="no judge has a part"):
        vlmix("score", "chartqa", rows, "--judge", "http://localhost:1", "--judge-model", "m")


def test_a_benchmark_is_marked_by_the_judge_of_the_command(tmp_path):
    data, answers = tmp_path / "data", tmp_path / "answers.jsonl"
    samples = BENCHMARKS.get("llava_bench").tiny(data).samples()
    texts = [{"question_id": sample.id, "text": targets_of(sample)[0]} for sample in samples]
    answers.write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")
    asked = ("eval", "--from", answers, "-b", "llava_bench", "--data", data)
    with judging(lambda prompt: "no marks" if "lamp is red" in prompt else "8 6\nFine.") as (url, seen):
        run = vlmix(*asked, "--judge", url, "--judge-model", "marker", "--out", tmp_path / "judged")
    assert seen
    assert "relative_percent.all" in run.stdout
    found = json.loads((tmp_path / "judged/results.json").read_text(encoding="utf-8"))["results"][0]
    assert found["protocol"]["name"] == "gpt4"
    assert found["settings"]["judge"]["server"]["model"] == "marker"
    assert found["figures"]["judge_failed"] == 0.25
    assert found["figures"]["relative_percent.all"] == pytest.approx(100 * 4.5 / 8, abs=0.1)
    rows = [json.loads(line) for line in (tmp_path / "judged/answers.jsonl").read_text().splitlines()]
    assert ["no marks" in row["parsed"] for row in rows].count(True) == 1
    told = vlmix(*asked, "--out", tmp_path / "plain")
    assert "no judge is named" in told.output
    assert "no judge is named" in (tmp_path / "plain/report.html").read_text(encoding="utf-8")
    with pytest.raises(InputError, match="no judge marks synth_qa"):
        vlmix("eval", "--from", answers, "-b", "synth_qa", "--judge", url, "--judge-model", "m", "--out", "x")
