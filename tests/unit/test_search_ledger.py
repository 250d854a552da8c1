"""The ledger of a search: a line is whole or absent wherever writing was cut off; and what sharing saves."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmix.core.errors import CheckpointError, RecipeError
from vlmix.core.settings import read_settings
from vlmix.search.costs import account, naive_seconds
from vlmix.search.executors import Job, schedule
from vlmix.search.ledger import Entry, Ledger, Seconds
from vlmix.search.settings import Grid


def entry(key, total=10.0, **more):
    return Entry(key=key, seconds=Seconds(total=total, train=total / 2, judge=1.0), **more)


ENTRIES = [
    entry("a", encoders=("red",), figures={"synth_qa.accuracy": 0.1 + 0.2}, cost={"tokens": 9.0}),
    entry("b", settings={"model.fusion.kind": "single"}, seed=3, error="line one\nline two | <b>"),
    entry("c", made={"aligned x": 7.5}, used={"features y": 0.25}),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    ledger = Ledger.open(path)
    for each in ENTRIES:
        ledger.add(each)
    return path


@given(st.data())
def test_wherever_it_is_cut_whole_trials_are_left_and_the_next_one_fits(written, data):
    content = written.read_bytes()
    length = data.draw(st.integers(0, len(content)))
    path = written.with_name("cut.jsonl")
    path.write_bytes(content[:length])
    ledger = Ledger.open(path)
    whole = content[:length].count(b"\n")
    assert list(ledger.entries.values()) == ENTRIES[:whole]
    assert path.read_bytes() == b"".join(content.splitlines(keepends=True)[:whole])
    ledger.add(entry("new"))
    assert list(Ledger.open(path).entries) == [*"abc"[:whole], "new"]


def test_a_line_that_somebody_changed_is_named(written, tmp_path):
    lines = written.read_bytes().splitlines(keepends=True)
    for bad in (b"{}\n", b"not json\n", lines[0].replace(b"search_ledger/1", b"search_ledger/2"), b"[1]\n"):
        path = tmp_path / "bad.jsonl"
        path.write_bytes(bad + lines[1])
        with pytest.raises(CheckpointError, match=r"bad.jsonl, line 1"):
            Ledger.open(path)


def test_naive_cost_charges_every_trial_with_what_it_took():
    made = {"aligned x": 30.0, "aligned y": 20.0, "features y": 4.0}
    first = entry("1", 40.0, made={"aligned x": 30.0})
    second = entry("2", 35.0, made={"aligned y": 20.0, "features y": 4.0}, used={"aligned x": 1.0})
    third = entry("3", 12.0, used={"aligned x": 1.0, "aligned y": 1.0, "features y": 0.5})
    assert [naive_seconds(each, made) for each in (first, second, third)] == [40.0, 65.0, 64.0]
    found = account([first, second, third], made, start=5.0)
    assert (found.reuse, found.naive, found.pieces, found.taken) == (92.0, 174.0, 3, 4)
    # A search that finds the pieces of an earlier one pays for each of them once all the same.
    assert account([third], made, start=5.0).reuse == 5.0 + 12.0 + 30.0 + 20.0 + 4.0


POOL = {"red": {"kind": "clip"}, "blue": {"kind": "clip"}}
GRID = {"name": "g", "recipe": "demo", "strategy": {"kind": "grid"}, "objective": "a.b", "encoders": POOL}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"objectiv": "x"}, "unknown key. Did you mean 'objective'"),
        ({"align": {"stage": {"train": {}}}}, "`solo` must hold the `projector`"),
        (
            {"align": {"stage": {"solo": {"projector": {}}}, "skip": ["green"]}},
            "no encoder is called 'green'",
        ),
        ({"align": {"stage": {"name": "x", "solo": {"projector": {}}}}}, "leave `name` out"),
        ({"axes": {"encoders": [["red", "green"]]}}, "no list of different names"),
        ({"axes": {"encoders": [["red", "red"]]}}, "no list of different names"),
        ({"axes": {"stages.0.steps": {"low": 3, "high": 2}}}, "`low` must be below `high`"),
        ({"axes": {"stages.0.steps": []}}, "at least 1 item"),
        ({"encoders": {"Red Eye": {}}}, "small letters"),
        ({"encoders": {}, "start": {"stages": [{}]}}, "name them in `encoders`"),
        ({"seeds": [1, 1]}, "given twice"),
        ({"stop": {"gain": -1}}, "stop.gain"),
    ],
)
def test_a_grid_that_does_not_fit_is_told_by_key_and_remedy(changes, says):
    with pytest.raises(RecipeError) as error:
        read_settings(Grid, {**GRID, **changes})
    assert says in str(error.value)


def test_two_trials_run_at_once_unless_they_would_make_the_same_piece():
    def job(key, *needs):
        return Job(key, None, Path(key), Path(key), {}, frozenset(needs), key)

    jobs = [job("a", "red"), job("b", "red", "blue"), job("c"), job("d", "red")]
    running, seen, done, together = set(), [], [], threading.Barrier(2)

    def work(each):
        if each.key in {"a", "c"}:
            together.wait()  # neither ends before both have begun
        return entry(each.key)

    def begin(each):
        running.add(each.key)
        seen.append({*running})
        return pool.submit(work, each)

    def end(each, _):
        running.remove(each.key)
        done.append(each.key)

    with ThreadPoolExecutor(2) as pool:
        schedule(jobs, 2, begin, end)
    assert sorted(done) == ["a", "b", "c", "d"]
    assert seen[:2] == [{"a"}, {"a", "c"}]
    assert all(len(each) <= 2 for each in seen)
