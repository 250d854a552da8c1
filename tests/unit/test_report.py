"""The report: the same bytes for the same answers, one page that holds everything and runs nothing."""

import json
import math
import random
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlmix.core.errors import InputError
from vlmix.core.interfaces import Benchmark
from vlmix.core.sample import Answer, Decoding, ImageRef, Sample, Score, Turn
from vlmix.core.settings import PartSettings
from vlmix.evals.cost import RunCost
from vlmix.evals.curves import Curve, Series, curves_of, read_curves, thinned, ticks
from vlmix.evals.report import write_report
from vlmix.evals.responder import CannedResponder
from vlmix.evals.run import evaluate

HOSTILE = (
    "</pre></title></style><script>alert(1)</script>"
    "<img src=http://x.example/a.png onerror=alert(2)>'\"\0\u202e"
)
VOID = {"meta", "img", "line", "rect", "circle", "polyline", "br"}


class ToySettings(PartSettings):
    kind: str = "toy"
    note: str = ""


class Toy(Benchmark):
    settings_class, headline = ToySettings, "accuracy"

    def __init__(self, samples, note=""):
        super().__init__(ToySettings(note=note))
        self.rows = samples

    def samples(self):
        return self.rows

    def score(self, sample, answer):
        right = not answer.error and answer.text == sample.target
        return Score(sample.id, float(right), answer.text, sample.task, sample.group)

    def summarise(self, scores):
        return {"accuracy": sum(score.value for score in scores) / len(scores)}

    @classmethod
    def tiny(cls, folder):
        raise NotImplementedError


class Page(HTMLParser):
    """Collects tags, attributes and text, and fails where tags do not close in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def picture(shade, side=8):
    return ImageRef(Image.new("RGB", (side, side), (shade, 0, 0)))


def samples_of(n=24, text="how many?", task="count"):
    return [
        Sample(
            f"s{i}", (Turn("user", (picture(i), text)), Turn("assistant", (str(i % 3),))), str(i % 3), task
        )
        for i in range(n)
    ]


def judged(samples=None, answer=None, note="", **kwargs):
    samples = samples or samples_of()
    texts = {s.id: (answer or s.target) if i % 4 else "no" for i, s in enumerate(samples)}
    return evaluate(CannedResponder(texts), Toy(samples, note), **kwargs)


def test_the_same_answers_give_the_same_bytes_whatever_the_batch_or_the_clock(tmp_path):
    def write(name, batch_size, seconds):
        result = judged(decoding=Decoding(batch_size=batch_size))
        result = replace(result, model=replace(result.model, seconds=seconds))
        write_report(tmp_path / name, "title", [result])
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    first, again = write("a", 1, 1.0), write("b", 64, 9.0)
    assert set(first) == {"results.json", "answers.jsonl", "timing.json", "report.html"}
    assert first["results.json"] == again["results.json"]
    assert first["answers.jsonl"] == again["answers.jsonl"]
    assert first["timing.json"] != again["timing.json"]


def test_a_report_replaces_a_report_and_nothing_else(tmp_path):
    result = judged()
    write_report(tmp_path / "report", "old", [result])
    write_report(tmp_path / "report", "new", [result])
    assert json.loads((tmp_path / "report" / "results.json").read_text())["title"] == "new"
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    for taken in (tmp_path / "thesis", tmp_path / "thesis" / "chapter.txt"):
        with pytest.raises(InputError, match="exists and is not a report"):
            write_report(taken, "title", [result])
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_results_say_what_was_measured_against_what_and_how(tmp_path):
    result = judged(decoding=Decoding(max_new_tokens=7), seed=5)
    write_report(tmp_path / "report", "title", [result], notes=["quarantined: 2 of 30 rows"])
    found = json.loads((tmp_path / "report" / "results.json").read_text())
    assert (found["schema"], found["notes"]) == ("vlmix.results/1", ["quarantined: 2 of 30 rows"])
    entry = found["results"][0]
    assert (entry["benchmark"], entry["headline"], entry["n"], entry["failed"]) == ("toy", "accuracy", 24, 0)
    assert entry["figures"]["accuracy"] == pytest.approx(18 / 24)
    interval = entry["intervals"]["accuracy"]
    assert interval["low"] < entry["figures"]["accuracy"] < interval["high"]
    assert (interval["method"], interval["n"]) == ("wilson", 24)
    assert (entry["majority"]["answer"], entry["majority_by_task"]["answers"]) == ("0", {"count": "0"})
    assert entry["majority"]["figures"]["accuracy"] == pytest.approx(1 / 3, abs=1e-6)
    assert entry["blind"]["n"] == 24
    assert entry["tasks"]["count"]["n"] == 24
    assert (entry["decoding"]["max_new_tokens"], entry["seeds"]["blind"]) == (7, 5)
    assert {"vlmix", "torch", "transformers", "python"} <= set(entry["versions"])
    rows = [json.loads(line) for line in (tmp_path / "report" / "answers.jsonl").read_text().splitlines()]
    assert [(row["sample_id"], row["value"]) for row in rows] == [
        (s.sample_id, s.value) for s in result.model.scores
    ]


def test_the_page_holds_everything_and_runs_nothing_even_when_texts_are_hostile(tmp_path):
    samples = samples_of(text=HOSTILE, task=HOSTILE)
    samples[0] = replace(samples[0], turns=(Turn("user", (ImageRef(tmp_path / "gone.png"), HOSTILE)),))
    curves = [Curve(HOSTILE, (Series(HOSTILE, ((0, 3.0), (1, 2.0))), Series("b", ((0, 1.0), (1, 1.5)))))]
    page = write_report(
        tmp_path / "report",
        HOSTILE,
        [judged(samples, answer=HOSTILE + "\ud800", note=HOSTILE)],
        curves=curves,
        recipe_text=HOSTILE,
        notes=[HOSTILE],
        gallery=8,
    )
    text = page.read_text(encoding="utf-8")
    parsed = Page(text)
    assert "script" not in parsed.tags
    assert not [name for _, name, _ in parsed.attributes if name.startswith("on")]
    fetched = [value for _, name, value in parsed.attributes if name in {"src", "href", "srcset", "data"}]
    assert fetched
    assert all(value.startswith("data:image/png;base64,") for value in fetched)
    assert "url(" not in text
    assert "@import" not in text
    policy = [value for tag, name, value in parsed.attributes if (tag, name) == ("meta", "content")]
    assert any("default-src 'none'" in value for value in policy)
    assert sum("alert(1)" in piece for piece in parsed.texts) >= 8, "foreign text must be shown, as text"
    assert parsed.tags.count("polyline") == 2
    assert any("gone.png does not exist" in piece for piece in parsed.texts)


def test_the_gallery_shows_wrong_and_right_answers_and_no_more_than_asked(tmp_path):
    def count(samples, gallery):
        page = Page(write_report(tmp_path / "r", "t", [judged(samples)], gallery=gallery).read_text())
        return [sum(text == mark for text in page.texts) for mark in "✗✓"]

    assert count(samples_of(24), 8) == [4, 4]
    assert count(samples_of(8), 8) == [2, 6]
    assert count(samples_of(8), 0) == [0, 0]


def test_a_new_report_replaces_the_old_one_and_a_failed_one_does_not(tmp_path):
    folder = tmp_path / "report"
    write_report(folder, "old", [judged()])
    old = {path.name: path.read_bytes() for path in folder.iterdir()}
    broken = judged()
    broken = replace(broken, model=replace(broken.model, figures={"accuracy": math.nan}))
    with pytest.raises(ValueError, match="JSON"):
        write_report(folder, "broken", [broken])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == old
    write_report(folder, "new", [judged()])
    assert "new" in (folder / "report.html").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["report"], "a temporary folder was left behind"


def test_curves_put_stages_behind_one_another():
    rows = [{"step": s, "stage": name, "loss": s + 1.0, "lr": None} for name in ("a", "b") for s in (1, 2, 3)]
    (curve,) = curves_of([*rows, {"event": "end"}, {"step": 4, "stage": "b", "loss": math.inf}])
    assert (curve.title, [series.name for series in curve.series]) == ("loss", ["a", "b"])
    assert [x for series in curve.series for x, _ in series.points] == [1, 2, 3, 4, 5, 6]
    on = [
        {"step": s, "stage": name, "loss": 1.0}
        for name, steps in (("a", (1, 2)), ("b", (3, 4)))
        for s in steps
    ]
    assert [x for series in curves_of(on)[0].series for x, _ in series.points] == [1, 2, 3, 4]


def test_curves_are_read_from_a_file_whose_last_line_a_crash_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "stage": "a", "loss": 2.0}\n{"step": 2, "stage": "a", "lo')
    assert read_curves(path) == [Curve("loss", (Series("a", ((1.0, 2.0),)),))]
    path.write_text("nothing\n")
    for bad in (path, tmp_path / "gone"):
        with pytest.raises(InputError, match="cannot read the metrics"):
            read_curves(bad)


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_enclose_what_is_drawn(low, span):
    found = ticks(low, low + span)
    assert 2 <= len(found) <= 9
    assert found == sorted(set(found))
    assert found[0] <= low + span * 1e-6 + abs(low) * 1e-8
    assert found[-1] >= low + span - (span * 1e-6 + abs(low) * 1e-8)


def test_thinning_keeps_short_lines_and_the_mean_of_long_ones():
    short = [(float(i), 1.0) for i in range(10)]
    assert thinned(short) == short
    long = [(float(i), random.Random(i).random()) for i in range(1200)]
    few = thinned(long, 240)
    assert len(few) == 240
    assert sum(y for _, y in few) / 240 == pytest.approx(sum(y for _, y in long) / 1200)


class Points(Toy):
    """As an official rule: points of 200, a percentage, and answers it cannot read."""

    headline, units = "points", {"points": "points of 200", "right_percent": "%", "asked": "questions"}
    protocol, source = "tool<b>", "owner/repository@1234 tool.py"

    def score(self, sample, answer):
        return replace(super().score(sample, answer), state="unparsed" if answer.text == "no" else "read")

    def summarise(self, scores):
        right = sum(score.value for score in scores) / len(scores)
        both = sum(score.value for score in scores if score.sample_id < "s2") / len(scores)
        return {"points": 100 * right + 50 * both, "right_percent": 100 * right, "asked": float(len(scores))}


def test_figures_stand_in_their_own_unit_with_protocol_states_and_cost(tmp_path):
    samples = samples_of(24)
    samples[5] = replace(samples[5], defect="line 6: the picture <gone.png> is not there")
    texts = {s.id: s.target if i % 4 else "no" for i, s in enumerate(samples)}
    result = evaluate(CannedResponder(texts), Points(samples), blind=False)
    cost = RunCost(12_000_000, 3_000_000, 24_000_000, 1, 576, 64, 2.5, 7.5e9)
    page = Page(write_report(tmp_path / "r", "t", [result], costs=[cost]).read_text())
    text = " ".join(" ".join(page.texts).split())
    points = result.model.intervals["points"]
    assert points.method == "jackknife"
    assert f"{points.value:.1f}" in text
    assert "points of 200 95 % interval" in text
    assert f"{points.low:.1f} to {points.high:.1f}" in text
    assert "70.8 50.8 to 85.1" in text, "percent are shares: Wilson's ends for 17 of 24"
    assert "asked 24.000" in text
    assert "tool<b>: owner/repository@1234 tool.py" in text
    assert "6 unparsed" in text
    assert "line 6: the picture <gone.png> is not there" in text
    assert "12,000,000 parameters, 3,000,000 of them met by one token" in text
    assert "answer of 2.5 tokens it takes 7.5 GFLOP" in text
    (entry,) = json.loads((tmp_path / "r" / "results.json").read_text())["results"]
    assert entry["states"] == {"read": 18, "unparsed": 6}
    assert entry["unasked"] == {"s5": "line 6: the picture <gone.png> is not there"}
    assert (entry["cost"]["flops"], entry["protocol"]["name"]) == (7.5e9, "tool<b>")
    kept = json.loads((tmp_path / "r" / "replicates.json").read_text())["results"][0]
    assert len(kept["figures"]["points"]) == 24
    clock = json.loads((tmp_path / "r" / "timing.json").read_text())["toy"]
    assert clock["peak_bytes"] > 1e6
    assert clock["tokens_per_second"] is None, "answers made elsewhere took no time"


def test_failed_answers_are_shown_as_failed(tmp_path):
    samples = samples_of(4)
    result = evaluate(CannedResponder({samples[0].id: "0"}), Toy(samples), blind=False)
    page = Page(write_report(tmp_path / "r", "t", [result]).read_text())
    assert result.model.answers[1] == Answer("s1", "", error="no answer was given for sample 's1'")
    assert any("3 failed, counted as wrong" in text for text in page.texts)
    assert sum(text == "✗ failed" for text in page.texts) == 3
