"""Judging models: a server that fails in every way, cassettes, and answers that nobody marked."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from vlmix.core.errors import InputError, JudgeError, RecipeError
from vlmix.core.parts import SCORERS
from vlmix.core.sample import Row
from vlmix.core.settings import read_settings
from vlmix.evals.judges.asking import Question, marks
from vlmix.evals.judges.cassette import CassetteJudge
from vlmix.evals.judges.server import ServerJudge, ServerSettings
from vlmix.evals.judges.settings import JudgeSettings

QUESTION = Question("How good?", system="Be fair.", max_tokens=3)


def completion(text):
    return json.dumps({"choices": [{"message": {"content": text}}]}).encode()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


@contextmanager
def serving(*steps):
    """A server that takes a step for each request, the last one again and again; its judge and requests."""
    seen, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                step = steps[min(len(seen), len(steps) - 1)]
                seen.append((self.path, dict(self.headers), body))
            step(self)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        settings = ServerSettings(
            url=f"http://127.0.0.1:{server.server_port}/v1/",
            model="marker",
            timeout_seconds=0.3,
            tries=3,
            wait_seconds=0.01,
        )
        yield ServerJudge(settings), seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def replies(content, status=200, headers=()):
    def step(handler):
        handler.send_response(status)
        for name, value in [("Content-Length", str(len(content))), *headers]:
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)

    return step


def sleeps(handler):
    time.sleep(0.6)
    handler.close_connection = True


def hangs_up(handler):
    handler.connection.close()


def drips(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(8):
        handler.wfile.write(b" ")
        time.sleep(0.1)


def cut_short(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(completion("0.5"))


GOOD = replies(completion("0.5"))


def test_a_server_gets_openai_requests_with_the_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with serving(GOOD) as (judge, seen):
        assert judge.ask(QUESTION) == "0.5"
    path, headers, body = seen[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert [turn["role"] for turn in body["messages"]] == ["system", "user"]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("marker", 0.0, 3)


@pytest.mark.parametrize(
    "fault",
    [
        replies(b"oops", 500),
        replies(b"", 429, [("Retry-After", "0")]),
        replies(b"<html>"),
        replies(b'{"choices": []}'),
        replies(completion(None)),
        sleeps,
        hangs_up,
        drips,
    ],
)
def test_a_passing_fault_is_tried_again(fault):
    with serving(fault, GOOD) as (judge, seen):
        assert judge.ask(QUESTION) == "0.5"
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("fault", "tries", "told"),
    [
        (replies(b"oops", 500), 3, "HTTP 500 .*oops, 3 times"),
        (replies(b"bad key", 401), 1, "HTTP 401 .*bad key"),
        (replies(b"nonsense"), 3, "no chat completion"),
        (sleeps, 3, "no reply within 0.3 s"),
        (cut_short, 3, "a reply cut short"),
    ],
)
def test_a_lasting_fault_is_an_error_that_says_what_happened(fault, tries, told):
    with serving(fault) as (judge, seen), pytest.raises(JudgeError, match=told):
        judge.ask(QUESTION)
    assert len(seen) == tries


def test_nobody_there_is_an_error():
    settings = ServerSettings(url="http://127.0.0.1:9", model="m", tries=2, wait_seconds=0)
    with pytest.raises(JudgeError, match="no connection"):
        ServerJudge(settings).ask(QUESTION)


class Scripted:
    """Says what it is told, by what the prompt holds; an error where that is one."""

    model = "scripted"

    def __init__(self, **words):
        self.words, self.asked = words, []

    def ask(self, question):
        self.asked.append(question)
        said = next(word for key, word in self.words.items() if key in question.prompt)
        said = said.pop(0) if isinstance(said, list) else said
        if isinstance(said, Exception):
            raise said
        return said


def test_a_cassette_replays_what_it_recorded(tmp_path):
    path, inner = tmp_path / "deep/judge.jsonl", Scripted(How="0.5", What="é\u2028\n")
    recording = CassetteJudge(path, "scripted", inner)
    other = Question("What?")
    assert [recording.ask(each) for each in (QUESTION, other, QUESTION)] == ["0.5", "é\u2028\n", "0.5"]
    assert len(inner.asked) == 2
    replay = JudgeSettings(cassette=path, model="scripted").judge()
    assert [replay.ask(each) for each in (other, QUESTION)] == ["é\u2028\n", "0.5"]
    with pytest.raises(JudgeError, match="holds no reply"):
        replay.ask(Question("How good?", temperature=0.5))
    with pytest.raises(JudgeError, match="holds no reply"):
        CassetteJudge(path, "another").ask(QUESTION)


def test_a_cassette_cut_short_goes_on_where_it_was(tmp_path):
    path = tmp_path / "judge.jsonl"
    CassetteJudge(path, "scripted", Scripted(How="0.5")).ask(QUESTION)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:30])
    again = CassetteJudge(path, "scripted", Scripted(What="1"))
    assert [again.ask(QUESTION), again.ask(Question("What?"))] == ["0.5", "1"]
    assert path.read_bytes().startswith(whole)
    assert [json.loads(line)["reply"] for line in path.read_text().splitlines()] == ["0.5", "1"]


def test_a_broken_or_absent_cassette_is_named(tmp_path):
    with pytest.raises(InputError, match="no such cassette"):
        CassetteJudge(tmp_path / "none.jsonl", "m")
    path = tmp_path / "judge.jsonl"
    path.write_text('{"key": "a", "reply": "b"}\n{"key": "a"}\n')
    with pytest.raises(InputError, match="line 2"):
        CassetteJudge(path, "m")


def test_threads_record_each_reply_once(tmp_path):
    path = tmp_path / "judge.jsonl"
    asked = [[Question(f"How {number % 5}?")] for number in range(40)]
    found = marks(CassetteJudge(path, "m", Scripted(How="1")), asked, lambda reply: (float(reply),), slots=8)
    assert all(mark.figures == (1.0,) for mark in found)
    assert len(path.read_text().splitlines()) == 5


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"cassette": "c.jsonl"},
        {"server": {"url": "ftp://x", "model": "m"}},
        {"server": {"url": "http://x", "model": "m"}, "model": "other"},
    ],
)
def test_settings_that_name_no_judge_are_refused(raw):
    with pytest.raises(RecipeError):
        read_settings(JudgeSettings, raw, "judge")


def vet(**words):
    rows = [
        Row(key, f"{key}<AND>b", "an answer", {"question": f"ask {key}?", "capability": ["ocr", "rec"]})
        for key in words
    ]
    rows.append(Row("none", "a", None, {"question": "?", "capability": "ocr"}))
    judge = Scripted(**{f"ask {key}?": word for key, word in words.items()})
    scorer = SCORERS.get("mmvet")(judge)
    found = scorer.judge(rows, "gpt4")
    return rows, found, scorer.summarise(rows, found, "gpt4"), judge


def test_mmvet_marks_and_what_is_no_mark():
    rows, found, summary, judge = vet(
        good="0.8 |",
        late=["nothing", "1.5", "0.4"],
        never="perfect",
        broken=JudgeError("no reply within 60 s"),
    )
    assert [each.value for each in found] == [0.8, 0.4, 0.0, 0.0, None]
    assert [each.state for each in found] == ["read", "read", "failed", "failed", "missing"]
    assert "perfect" in found[2].parsed
    assert "60 s" in found[3].parsed
    assert summary["total_percent"] == pytest.approx(100 * 1.2 / 5)
    assert summary["capability_percent"] == {"ocr": 24.0, "rec": 30.0}
    tries = [question for question in judge.asked if "never" in question.prompt]
    assert [question.temperature for question in tries] == [0.0, 0.0, 0.5, 1.0, 1.5]
    assert "never <AND> b" in tries[0].prompt
    assert len(rows) == len(found)


def bench(reply):
    row = Row("1", "reference", "answer", {"question": "ask?", "category": "conv", "caption": ["one", "two"]})
    return SCORERS.get("llava_bench")(Scripted(ask=reply)).judge([row], "gpt4")[0]


@pytest.mark.parametrize(
    ("reply", "state", "value"),
    [
        ("8 6\nBecause.", "read", 6),
        ("8,6.5", "read", 6.5),
        ("8, 6", "failed", 0),  # two blanks once the comma is one
        ("Scores: 8 6", "failed", 0),
        ("\n8 6", "failed", 0),
        ("80 60", "failed", 0),
        ("nan 6", "failed", 0),
        ("", "failed", 0),
    ],
)
def test_llava_bench_reads_two_marks_on_the_first_line(reply, state, value):
    found = bench(reply)
    assert (found.state, found.value) == (state, value)


def test_an_answer_whose_judge_failed_lowers_the_figure():
    fields = {"category": "detail", "caption": "c"}
    rows = [Row(key, "r", "a", {**fields, "question": key}) for key in ("one", "two")]
    scorer = SCORERS.get("llava_bench")(Scripted(one="8 6", two="?"))
    found = scorer.judge(rows, "gpt4")
    relative = scorer.summarise(rows, found, "gpt4")["relative_percent"]
    assert relative == {"all": 37.5, "llava_bench_detail": 37.5}


@pytest.mark.parametrize("name", ["mmvet", "llava_bench"])
def test_without_a_judge_the_rules_that_need_none_are_named(name):
    scorer = SCORERS.get(name)
    free = [protocol for protocol in scorer.protocols if protocol not in scorer.marked]
    row = Row("1", "a", "a", {"question": "q", "capability": "rec", "category": "conv", "caption": "c"})
    with pytest.raises(InputError, match=", ".join(free)):
        scorer().judge([row], scorer.official())
    assert all(scorer().judge([row], protocol)[0].value == 1 for protocol in free)


def test_parts_of_an_answer_are_whole_words():
    def share(gold, answer):
        row = Row("1", gold, answer, {"question": "q", "capability": "rec"})
        return SCORERS.get("mmvet")().judge([row], "elements")[0].value

    assert share("-1<AND>-5", "x = -5 or 5") == 0.5
    assert share("9:50<OR>ten to ten", "It's ten to ten.") == 1
    assert share("cat", "a catalogue") == 0
