"""`vlmix compare` on real reports: tables, verdicts, a page that holds everything, folders that are none."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlmix.cli.main import app
from vlmix.core.errors import InputError
from vlmix.core.sample import Answer
from vlmix.evals.benchmarks.synth_qa import SynthQa, SynthQaSettings
from vlmix.evals.cost import RunCost
from vlmix.evals.report import write_report
from vlmix.evals.run import evaluate

pytestmark = pytest.mark.flow
BENCHMARK = SynthQa(SynthQaSettings(size=60))
SAMPLES = BENCHMARK.samples()
HOSTILE = "</td><script>alert(1)</script>| **x**\n\ud800"


class Speaker:
    """Answers rightly where ``knows`` says so, else with something hostile; takes its time."""

    def __init__(self, knows):
        self.right = {s.id: s.target for i, s in enumerate(SAMPLES) if knows(i)}

    def respond(self, samples, decoding):
        for sample in samples:
            yield Answer(sample.id, self.right.get(sample.id, HOSTILE), tokens=2, seconds=0.5)


def judged(folder, knows, flops=0.0, benchmark=BENCHMARK):
    result = evaluate(Speaker(knows), benchmark, blind=False)
    cost = RunCost(10**7, 5 * 10**6, 2 * 10**7, 1, 64, 64, 2.0, flops)
    write_report(folder, folder.name, [result], gallery=0, costs=[cost] if flops else ())
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    judged(root / "a" / "report", lambda i: i % 3 == 0, 4e9)
    return (
        root,
        root / "a",
        judged(root / "b", lambda i: i % 3 != 1, 9e9),
        judged(root / "c", lambda i: i % 3 == 2),
    )


def vlmix(*arguments):
    run = CliRunner().invoke(app, ["compare", *map(str, arguments)], env={"COLUMNS": "240"})
    if run.exception and not isinstance(run.exception, SystemExit):
        raise run.exception
    return run.stdout


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in {"src", "href"}]

    def handle_data(self, data):
        self.text += data


def test_two_runs_get_a_verdict_tables_and_a_page(runs, tmp_path):
    _, a, b, _ = runs
    out = tmp_path / "deep" / "comparison"
    told = vlmix(a, b, "--out", out)
    verdict = re.search(r"synth_qa: (.* is ahead of .* by 33\.3 points \[.*\]); p below 0\.001\n", told)
    assert verdict is not None
    assert f"{b} won 20 questions and lost 0; McNemar's exact test" in told
    assert {path.name for path in out.iterdir()} == {"comparison.html", "comparison.md", "comparison.json"}
    found = json.loads((out / "comparison.json").read_text())
    (contest,) = found["contests"]
    assert (contest["state"], contest["figure"]["value"]) == ("ahead", pytest.approx(1 / 3, abs=1e-5))
    assert len(contest["tasks"]) == 9
    assert contest["p"] == pytest.approx(2 / 2**20)
    table = (out / "comparison.md").read_text()
    assert verdict[1].replace("_", r"\_").replace("[", r"\[").replace("]", r"\]") in table
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines() if line.startswith("|")]
    assert {*widths} == {7, 9, 10}, "a hostile answer must not add a cell"
    assert "| 10 | 5 | 64 | 4 | 4 | 0.5 |" in table, "parameters, tokens, FLOPs and time beside the score"
    page = Page((out / "comparison.html").read_text())
    assert "script" not in page.tags
    assert page.tags.count("figure") == 6, "six wins, no loss"
    assert page.sources
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert page.tags.count("img") == 7, "a picture for each question, and score against cost"
    assert "alert(1)" in page.text
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    vlmix(a, b, "--out", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_many_runs_and_a_baseline(runs, tmp_path):
    _, a, b, c = runs
    out = tmp_path / "comparison"
    told = vlmix(a, b, c, "--baseline", b, "--out", out, "--examples", "0", "--against", "seconds")
    assert told.count("Holm's correction for 2 comparisons") == 2
    assert f"{b} is ahead of {a} by" in told
    assert "seconds for a question" not in told
    page = Page((out / "comparison.html").read_text())
    assert page.tags.count("figure") == 0
    assert page.tags.count("img") == 1
    equal = vlmix(a, c, "--out", out)
    assert re.search(r"undecided: .* minus .* is 0\.0 points \[-\d", equal)
    assert "not known" in equal, "c was judged without counting its cost"


def test_the_python_of_the_page_does_what_it_says(runs, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs/systems/reports.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    (tmp_path / "runs").symlink_to(runs[0])
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "reports.md", "exec"), {})
    assert capsys.readouterr().out.startswith("synth_qa runs/b is ahead of runs/a by 33.3 points [")


def test_figures_that_are_no_means_are_paired_by_what_the_report_kept(tmp_path):
    class Whole(SynthQa):
        headline = "whole"

        def score(self, sample, answer):
            return replace(super().score(sample, answer), group=f"g{int(sample.id.split('-')[-1]) // 2}")

        def summarise(self, scores):
            groups = {}
            for score in scores:
                groups.setdefault(score.group, []).append(score.value)
            return {"whole": sum(map(min, groups.values())) / len(groups)}

    benchmark = Whole(SynthQaSettings(size=60))
    a = judged(tmp_path / "a", lambda i: i % 4 < 2, benchmark=benchmark)
    b = judged(tmp_path / "b", lambda i: i % 12 != 0, benchmark=benchmark)
    assert (a / "replicates.json").is_file()
    told = vlmix(a, b, "--out", tmp_path / "comparison", "--examples", "0")
    assert "paired jackknife" in told
    assert re.search(r"b is ahead of .* by 33\.3 points", told)


def test_what_is_no_report_or_a_damaged_one_is_named(runs, tmp_path):
    _, a, b, _ = runs
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for arguments, reason in (
        ([a, tmp_path], "holds no results.json"),
        ([a, a], "named twice"),
        ([a], "at least two"),
        ([a, b, "--out", tmp_path / "mine"], "is not a comparison"),
        ([a, b, "--against", "money"], "choose one of flops, tokens, seconds"),
        ([a, b, "--baseline", tmp_path], "none of the runs"),
    ):
        with pytest.raises(InputError, match=reason):
            vlmix(*arguments, "--out", tmp_path / "out") if "--out" not in arguments else vlmix(*arguments)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert not (tmp_path / "out").exists()

    def damaged(name, change):
        folder = tmp_path / name
        folder.mkdir()
        for file in ("results.json", "answers.jsonl"):
            (folder / file).write_text(change(file, (b / file).read_text()))
        return folder

    cut = damaged("cut", lambda file, text: text if file == "results.json" else text[: len(text) // 2])
    short = damaged(
        "short", lambda file, text: text if file == "results.json" else "".join(text.splitlines(True)[1:])
    )
    old = damaged("old", lambda file, text: text.replace("vlmix.results/1", "vlmix.results/0"))
    wild = damaged("wild", lambda file, text: text.replace('"value": 1.0', '"value": 7.0'))
    for folder, reason in (
        (cut, "answers.jsonl cannot be read"),
        (short, "60 questions were asked, and answers.jsonl has 59"),
        (old, "its schema is 'vlmix.results/0'"),
        (wild, "not in 0..1"),
    ):
        with pytest.raises(InputError, match=reason):
            vlmix(a, folder, "--out", tmp_path / "out")
