"""What a judge is asked and gives, and how the marks of many answers are had from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from vlmix.core.errors import JudgeError


@dataclass(frozen=True, slots=True)
class Question:
    """One request: ``prompt``, an optional word to the judge as a system, and how it may answer."""

    prompt: str
    system: str = ""
    temperature: float = 0.0
    max_tokens: int = 1024

    def body(self, model: str) -> dict[str, Any]:
        """The request as OpenAI's chat completions take it."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return {
            "model": model,
            "messages": [*system, {"role": "user", "content": self.prompt}],
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }

    def key(self, model: str) -> str:
        """A hash of the whole request: the same key, the same question to the same model."""
        body = json.dumps(self.body(model), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(body.encode("utf-8", "surrogatepass")).hexdigest()


class Judge(Protocol):
    """Whatever answers questions with text, in threads too; ``model`` names it in requests and reports."""

    @property
    def model(self) -> str:
        """The name of the judging model."""
        ...

    def ask(self, question: Question) -> str:
        """The judge's words.

        Raises:
            JudgeError: if there is none to be had.

        """
        ...


@dataclass(frozen=True, slots=True)
class Mark:
    """What came of asking: the figures read from ``reply``, or None with the reason in ``failure``."""

    figures: tuple[float, ...] | None
    reply: str = ""
    failure: str = ""


def mark(judge: Judge, attempts: Sequence[Question], read: Callable[[str], tuple[float, ...] | None]) -> Mark:
    """Ask until ``read`` makes figures of a reply; a judge that fails has tried enough."""
    reply = ""
    for question in attempts:
        try:
            reply = judge.ask(question)
        except JudgeError as error:
            return Mark(None, reply, str(error))
        if (figures := read(reply)) is not None:
            return Mark(figures, reply)
    return Mark(None, reply, f"no mark in what the judge said: {reply[:200]!r}")


def marks(
    judge: Judge,
    asked: Sequence[Sequence[Question]],
    read: Callable[[str], tuple[float, ...] | None],
    slots: int = 4,
) -> list[Mark]:
    """`mark` for each, in order, ``slots`` at a time."""
    with ThreadPoolExecutor(slots) as pool:
        return list(pool.map(lambda attempts: mark(judge, attempts, read), asked))
