"""A served model that answers: what it is sent, and that a question it fails is an error and never lost."""

import base64
import io
import json
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from vlmix.core.errors import InputError
from vlmix.core.sample import Decoding, ImageRef, Sample, Turn
from vlmix.evals.benchmarks.synth_qa import SynthQa, SynthQaSettings
from vlmix.evals.completions import Completions, Reply, ServerSettings, _seconds
from vlmix.evals.controls import question_of, targets_of
from vlmix.evals.run import evaluate
from vlmix.evals.served import ServerResponder


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


@contextmanager
def serving(answer):
    """A server that gives ``answer(body, count)``: text, or (status, headers); settings, and what it saw."""
    seen, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                seen.append((self.path, dict(self.headers), body))
                given = answer(body, len(seen))
            status, headers = (200, {}) if isinstance(given, str) else given
            reply = {"choices": [{"message": {"content": given}}], "usage": {"completion_tokens": 3}}
            content = json.dumps(reply).encode() if status == 200 else b"busy"
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        yield (
            ServerSettings(
                url=url, model="seer", key_variable="SEER_KEY", timeout_seconds=5, tries=3, wait_seconds=0.01
            ),
            seen,
        )
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def pictured(name, *more):
    picture = Image.new("RGB", (5, 3), (200, 10, 30))
    turns = (Turn("system", ("Be brief.",)), Turn("user", (ImageRef(picture), "What is it?")))
    return Sample(name, (*turns, *more))


def words(body):
    return body["messages"][-1]["content"]


@pytest.mark.parametrize(("kind", "magic"), [("png", b"\x89PNG"), ("jpeg", b"\xff\xd8\xff")])
def test_pictures_go_as_files_inside_the_request_and_the_key_only_in_its_header(monkeypatch, kind, magic):
    monkeypatch.setenv("SEER_KEY", "secret")
    with serving(lambda *_: " red \n") as (settings, seen):
        responder = ServerResponder(settings, kind)
        (answer,) = responder.respond([pictured("a")], Decoding(7, batch_size=2))
    assert (answer.sample_id, answer.text, answer.tokens, answer.error) == ("a", "red", 3, "")
    path, headers, body = seen[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert "secret" not in json.dumps(body) + repr(responder.settings)
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("seer", 7, 0.0)
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    picture, text = words(body)
    assert text == {"type": "text", "text": "What is it?"}
    start, content = picture["image_url"]["url"].split(",")
    assert start == f"data:image/{kind};base64"
    raw = base64.b64decode(content)
    assert raw.startswith(magic)
    assert Image.open(io.BytesIO(raw)).size == (5, 3)


def test_several_are_asked_at_once_and_answers_come_back_in_order():
    together, meeting = [], threading.Barrier(4, timeout=5)

    def answer(body, _):
        together.append(words(body))
        return f"to {words(body)}"

    class Slow(Completions):
        def ask(self, body):
            meeting.wait()  # passes only if four requests are on their way at once
            return super().ask(body)

    samples = [Sample(str(number), (Turn("user", (str(number),)),)) for number in range(8)]
    with serving(answer) as (settings, _):
        responder = ServerResponder(settings)
        responder._client = Slow(settings)
        found = list(responder.respond(samples, Decoding(batch_size=4)))
    assert [one.text for one in found] == [f"to {number}" for number in range(8)]
    assert sorted(together) == [str(number) for number in range(8)]


def test_passing_faults_are_tried_again_and_lasting_ones_are_an_error_for_one_question(tmp_path):
    def answer(body, count):
        if words(body) == "never":
            return 500, {}
        if words(body) == "refused":
            return 401, {}
        return (429, {"Retry-After": "0"}) if count == 1 else "yes"

    rows = [Sample(text, (Turn("user", (text,)),)) for text in ("first", "never", "refused", "last")]
    gone = Sample("gone", (Turn("user", (ImageRef(tmp_path / "gone.png"), "?")),))
    with serving(answer) as (settings, seen):
        found = list(ServerResponder(settings).respond([*rows, gone], Decoding(batch_size=1)))
    assert [one.text for one in found] == ["yes", "", "", "yes", ""]
    assert "HTTP 500" in found[1].error
    assert "3 times" in found[1].error
    assert "HTTP 401" in found[2].error
    assert "gone.png" in found[4].error
    assert [words(body) for _, _, body in seen] == ["first"] * 2 + ["never"] * 3 + ["refused", "last"]


def test_what_a_server_fails_to_answer_stays_in_the_denominator():
    benchmark = SynthQa(SynthQaSettings.tiny())
    right = {question_of(one).turns[-1].text: targets_of(one)[0] for one in benchmark.samples()}

    def answer(body, _):
        text = "".join(part.get("text", "") for part in words(body))
        return (400, {}) if text == next(iter(right)) else right[text]

    with serving(answer) as (settings, _):
        result = evaluate(ServerResponder(settings), benchmark, Decoding(batch_size=3), blind=False)
    assert (
        result.model.failed
        == sum(question_of(s).turns[-1].text == next(iter(right)) for s in result.samples)
        > 0
    )
    assert len(result.model.scores) == 18
    assert result.model.figures["accuracy"] <= 1 - result.model.failed / 18


def test_a_server_that_is_not_there_and_questions_it_cannot_take():
    settings = ServerSettings(url="http://127.0.0.1:9/v1", model="m", tries=1, timeout_seconds=1)
    sample = Sample("a", (Turn("user", ("?",)),))
    (answer,) = ServerResponder(settings).respond([sample], Decoding())
    assert "no connection" in answer.error
    for how in (Decoding(plain=True), Decoding(choose="likelihood"), Decoding(beams=2)):
        with pytest.raises(InputError):
            list(ServerResponder(settings).respond([sample], how))


def test_a_server_is_waited_for_as_long_as_it_asks(monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    steps = [(503, {"Retry-After": "7"}), (503, {"Retry-After": "soon"}), "done"]
    with serving(lambda _, count: steps[count - 1]) as (settings, _):
        assert Completions(settings).ask({}) == Reply("done", 3)
    assert waits == [7.0, 0.02]
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert 25 < _seconds(soon) <= 30
    assert _seconds("Thu, 01 Jan 1970 00:00:00 GMT") == _seconds("") == 0.0
