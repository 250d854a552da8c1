"""The command that scores a file of answers: text, JSON, other protocols, and lines that are no rows."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from tests.scored_rows import PERFECT, free_protocols, raw_rows
from vlmix.cli.main import app
from vlmix.core.errors import InputError, UnknownNameError
from vlmix.core.parts import SCORERS

pytestmark = pytest.mark.flow
QUESTION = {
    "id": 1,
    "gold": "100",
    "answer": "95",
    "type": "human_test",
    "score": 0.5,
    "scores": {"other": 1},
}


def vlmix(*arguments):
    run = CliRunner().invoke(app, ["score", *map(str, arguments)], env={"COLUMNS": "200"})
    if run.exception and not isinstance(run.exception, SystemExit):
        raise run.exception
    return run.stdout


def scored(*arguments):
    return json.loads(vlmix(*arguments, "--json"))


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", [name for name in SCORERS.names() if name in PERFECT])
def test_lists_objects_and_lines_are_the_same_file(name, tmp_path):
    rows, protocol = raw_rows(name), free_protocols(name)[0]
    found = scored(name, jsonl(tmp_path / "rows.jsonl", rows), "--protocol", protocol)
    assert (found["benchmark"], found["n"], found["malformed"]) == (name, len(rows), [])
    assert found["protocol"] == protocol
    assert [sample["id"] for sample in found["samples"]] == [row["id"] for row in rows]
    for content in (rows, {"benchmark": name, "samples": rows}):
        other = tmp_path / "rows.json"
        other.write_text("\ufeff" + json.dumps(content, indent=1), encoding="utf-8")
        assert scored(name, other, "--protocol", protocol) == found


def test_protocols_differ_as_their_scripts_do(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [QUESTION])
    assert scored("chartqa", path)["samples"] == [{"id": 1, "score": 1.0, "parsed": "95", "state": "read"}]
    other = scored("chartqa", path, "--protocol", "qwen_vl")
    assert (other["protocol"], other["mean"], other["summary"]["relaxed_accuracy"]) == ("qwen_vl", 0, 0)
    assert other["source"].startswith("QwenLM/Qwen-VL@")


def test_what_is_no_row_is_listed_and_stays_in_the_denominator(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [
        json.dumps({**QUESTION, "question": "split\u2028here"}, ensure_ascii=False),
        "",
        '{"id": 2, "gold": "1", "ans',
        '{"id": 3, "answer": "1"}',
        "[1, 2]",
        '{"gold": "1", "answer": 1}',
        '{"gold": "1", "answer": null}',
        '{"gold": "1", "answer": "\\ud83d", "type": NaN}',
    ]
    path.write_bytes("\n".join(lines).encode() + b'\r\n{"gold": "\xff", "answer": "1"}')
    found = scored("chartqa", path)
    assert [bad["line"] for bad in found["malformed"]] == [3, 4, 5, 6, 9]
    reasons = " ".join(bad["reason"] for bad in found["malformed"])
    for word in ("not JSON", "'gold'", "list", "`answer` is int", "utf-8"):
        assert word in reasons
    assert found["counts"] == {
        "rows": 8,
        "scored": 2,
        "unscored": 1,
        "unparsed": 0,
        "guessed": 0,
        "missing": 1,
        "failed": 0,
        "malformed": 5,
    }
    assert found["n"] == 8
    assert found["mean"] == pytest.approx(1 / 8)
    assert [(sample["id"], sample["score"]) for sample in found["samples"]] == [(1, 1.0), (7, None), (8, 0.0)]
    text = vlmix("chartqa", path)
    assert "line 4: no field 'gold' (what is right)" in text
    assert "8 rows, 2 scored, 1 unscored, 1 missing, 5 malformed" in text


def test_a_row_that_breaks_the_rule_costs_one_row(tmp_path, monkeypatch):
    scorer = SCORERS.get("chartqa")
    sound = scorer.judge

    def picky(self, rows, protocol):
        if any(row.gold == "boom" for row in rows):
            raise TypeError("no such gold")
        return sound(self, rows, protocol)

    monkeypatch.setattr(scorer, "judge", picky)
    found = scored("chartqa", jsonl(tmp_path / "rows.jsonl", [QUESTION, {**QUESTION, "gold": "boom"}]))
    assert (found["n"], found["mean"], [bad["line"] for bad in found["malformed"]]) == (2, 0.5, [2])


def test_long_tables_are_cut_and_say_so(tmp_path):
    rows = [{**QUESTION, "id": f"[bold]{number}", "answer": "a\x1b[2J\nb" * 40} for number in range(30)]
    text = vlmix("chartqa", jsonl(tmp_path / "rows.jsonl", rows))
    assert "… and 10 more rows: --json has all" in text
    assert "[bold]19" in text
    assert "[bold]20" not in text
    assert "\x1b" not in text


def test_unknown_names_are_answered_with_the_known_ones(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [QUESTION])
    with pytest.raises(UnknownNameError, match=r"Did you mean 'chartqa'.*Known: .*vqav2"):
        vlmix("chart_qa", path)
    with pytest.raises(InputError, match=r"gpt4.* needs a judging model.*elements"):
        vlmix("mmvet", jsonl(tmp_path / "open.jsonl", raw_rows("mmvet")), "--protocol", "gpt4")
    with pytest.raises(UnknownNameError, match=r"Did you mean 'qwen_vl'.*Known: lmms_eval, pix2struct"):
        vlmix("chartqa", path, "--protocol", "qwenvl")


@pytest.mark.parametrize(
    ("content", "told"), [("", "empty"), ("[]", "empty"), ("{}", "'gold'"), ("no", "not JSON")]
)
def test_a_file_without_a_row_is_refused(content, told, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=told):
        vlmix("chartqa", path)
    with pytest.raises(InputError, match="cannot be read"):
        vlmix("chartqa", tmp_path)


def test_the_list_tells_the_protocols():
    text = CliRunner().invoke(app, ["list", "scorers"], env={"COLUMNS": "200"}).stdout
    assert set(SCORERS.names()) <= set(text.split())
    assert "vqaeval_official" in text


def test_scoring_needs_no_torch(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [QUESTION])
    code = (
        "import sys; from pathlib import Path; from vlmix.evals.scored import score_file\n"
        f"score_file('chartqa', Path({str(path)!r}))\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
