"""A judge behind any server that speaks OpenAI's chat completions."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from typing import Any

from pydantic import Field

from vlmix.core.errors import JudgeError
from vlmix.core.settings import Settings
from vlmix.evals.judges.asking import Question

_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_CHUNK = 1 << 16
_MOST = 1 << 24
_LONGEST_WAIT_SECONDS = 60.0


class _PassingError(Exception):
    """Something that may be gone at the next try; ``wait`` is what the server asked for, in seconds."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class ServerSettings(Settings):
    """Where the judge is. ``url`` ends before ``/chat/completions``; ``key_variable`` is in the environment.

    A reply may take ``timeout_seconds`` in all. Timeouts, lost connections, broken replies and the states
    that a server gives when busy are tried again, ``tries`` times in all, after ``wait_seconds``, then twice
    as long, and so on, or after as long as the server asks.
    """

    url: str = Field(pattern=r"^https?://")
    model: str = Field(min_length=1)
    key_variable: str = "OPENAI_API_KEY"
    timeout_seconds: float = Field(default=60.0, gt=0)
    tries: int = Field(default=4, ge=1)
    wait_seconds: float = Field(default=1.0, ge=0)


class ServerJudge:
    """Asks over HTTP; has no state, so that threads may share it."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings

    @property
    def model(self) -> str:
        """The name of the model at the server."""
        return self.settings.model

    def ask(self, question: Question) -> str:
        """The first choice's text.

        Raises:
            JudgeError: if the server refuses, or no try gave a reply; says what the last one gave.

        """
        content = json.dumps(question.body(self.model)).encode()
        reason = ""
        for count in range(self.settings.tries):
            try:
                return _text(self._post(content))
            except _PassingError as error:
                reason = str(error)
                if count + 1 < self.settings.tries:
                    time.sleep(
                        min(max(error.wait, self.settings.wait_seconds * 2**count), _LONGEST_WAIT_SECONDS)
                    )
        raise JudgeError(f"judge {self.model} at {self.settings.url}: {reason}, {self.settings.tries} times")

    def _post(self, content: bytes) -> bytes:
        url = self.settings.url.rstrip("/") + "/chat/completions"
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.settings.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(url, content, headers)
        deadline = time.monotonic() + self.settings.timeout_seconds
        try:
            with urllib.request.urlopen(request, timeout=self.settings.timeout_seconds) as response:
                return _read(response, deadline)
        except urllib.error.HTTPError as error:
            with error:
                told = error.read(_CHUNK).decode("utf-8", "replace")[:200]
                wait = error.headers.get("Retry-After", "")
            reason = f"HTTP {error.code} {error.reason}: {told}".rstrip(": ")
            if error.code not in _AGAIN:
                raise JudgeError(f"judge {self.model} at {self.settings.url}: {reason}") from None
            raise _PassingError(reason, float(wait) if wait.isdecimal() else 0.0) from None
        except TimeoutError:
            raise _PassingError(f"no reply within {self.settings.timeout_seconds:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.URLError) and isinstance(error.reason, TimeoutError):
                raise _PassingError(f"no reply within {self.settings.timeout_seconds:g} s") from None
            raise _PassingError(f"no connection ({error})") from None


def _read(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """The whole reply; a server that sends a little every now and then is timed out as well."""
    content = bytearray()
    while chunk := response.read1(_CHUNK):
        content += chunk
        if time.monotonic() > deadline:
            raise TimeoutError
        if len(content) > _MOST:
            raise _PassingError(f"a reply of more than {_MOST >> 20} MiB")
    if response.length:
        raise _PassingError("a reply cut short")
    return bytes(content)


def _text(content: bytes) -> str:
    try:
        reply: Any = json.loads(content)
        text = reply["choices"][0]["message"]["content"]
    except (ValueError, RecursionError, LookupError, TypeError):
        raise _PassingError(f"a reply that is no chat completion: {content[:100]!r}") from None
    if not isinstance(text, str):
        raise _PassingError("a reply without text")
    return text
