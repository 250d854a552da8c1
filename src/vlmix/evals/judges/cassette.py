"""A judge's replies on a JSONL file: asked once, the same for ever after."""

from __future__ import annotations

import json
import os
from pathlib import Path
from threading import Lock
from typing import Any

from vlmix.core.errors import InputError, JudgeError
from vlmix.core.files import storage_errors
from vlmix.evals.judges.asking import Judge, Question


class CassetteJudge:
    """Replies from ``path``; what it does not hold is asked of ``judge``, if there is one, and added.

    A line is a request's key (see `Question.key`), the request and the reply. A key that stands twice has the
    first reply. A last line that was cut short when a process died is taken away by the next recording.

    Raises:
        InputError: if the file is absent though nobody is there to record, or a line is no reply.

    """

    def __init__(self, path: Path, model: str, judge: Judge | None = None) -> None:
        self.path, self._model, self._judge = path, model, judge
        self._lock = Lock()
        if not path.is_file() and judge is None:
            raise InputError(f"{path}: no such cassette. Record one by naming a judge's server as well")
        content = path.read_bytes() if path.is_file() else b""
        self._whole = content.rfind(b"\n") + 1
        self._replies = dict[str, str]()
        lines = content[: self._whole].split(b"\n")
        for number, line in enumerate(lines, 1):
            if line.strip():
                key, reply = self._parsed(line, number)
                self._replies.setdefault(key, reply)

    @property
    def model(self) -> str:
        """The model that was asked."""
        return self._model

    def ask(self, question: Question) -> str:
        """The recorded reply, or a new one.

        Raises:
            JudgeError: if there is no such recording and nobody to ask, or that one fails.
            DiskFullError: if it cannot be recorded.

        """
        key = question.key(self.model)
        with self._lock:
            if key in self._replies:
                return self._replies[key]
        if self._judge is None:
            raise JudgeError(f"{self.path} holds no reply to this question of {self.model} (key {key[:12]})")
        reply = self._judge.ask(question)
        with self._lock:
            if key not in self._replies:
                self._record({"key": key, "request": question.body(self.model), "reply": reply})
                self._replies[key] = reply
            return self._replies[key]

    def _record(self, line: dict[str, Any]) -> None:
        content = (json.dumps(line, ensure_ascii=True, sort_keys=True) + "\n").encode()
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("r+b" if self.path.exists() else "xb") as file:
                file.truncate(self._whole)
                file.seek(self._whole)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        self._whole += len(content)

    def _parsed(self, line: bytes, number: int) -> tuple[str, str]:
        try:
            parsed = json.loads(line)
            key, reply = parsed["key"], parsed["reply"]
        except (ValueError, LookupError, TypeError):
            key = reply = None
        if not isinstance(key, str) or not isinstance(reply, str):
            raise InputError(f"{self.path}: line {number} is no reply of a judge; take it out or record anew")
        return key, reply
