"""A client of any server that speaks OpenAI's chat completions: answering models and judges."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final

from pydantic import Field

from vlmix.core.settings import Settings

_AGAIN: Final = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_CHUNK: Final = 1 << 16
_MOST: Final = 1 << 24
_LONGEST_WAIT_SECONDS: Final = 60.0


class NoReplyError(Exception):
    """A server refused, or no try gave a reply; users of the client make it an error of their own."""


class _PassingError(Exception):
    """Something that may be gone at the next try; ``wait`` is what the server asked for, in seconds."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class ServerSettings(Settings):
    """Where a model is served. ``url`` ends before ``/chat/completions``; the key is in ``key_variable``.

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


@dataclass(frozen=True, slots=True)
class Reply:
    """The first choice's text, and its tokens by the server's own count; 0 where it gives none."""

    text: str
    tokens: int = 0


class Completions:
    """Asks over HTTP; has no state, so that threads may share it."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings

    def ask(self, body: Mapping[str, Any]) -> Reply:
        """Send one request and give its reply.

        Raises:
            NoReplyError: if the server refuses, or no try gave a reply; says what the last one gave.

        """
        content = json.dumps(body).encode()
        reason = ""
        for count in range(self.settings.tries):
            try:
                return _reply(self._post(content))
            except _PassingError as error:
                reason = str(error)
                if count + 1 < self.settings.tries:
                    wait = max(error.wait, self.settings.wait_seconds * 2**count)
                    time.sleep(min(wait, _LONGEST_WAIT_SECONDS))
        raise NoReplyError(f"{self._name}: {reason}, {self.settings.tries} times")

    @property
    def _name(self) -> str:
        return f"{self.settings.model} at {self.settings.url}"

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
                wait = _seconds(error.headers.get("Retry-After", ""))
            reason = f"HTTP {error.code} {error.reason}: {told}".rstrip(": ")
            if error.code not in _AGAIN:
                raise NoReplyError(f"{self._name}: {reason}") from None
            raise _PassingError(reason, wait) from None
        except TimeoutError:
            raise _PassingError(f"no reply within {self.settings.timeout_seconds:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.URLError) and isinstance(error.reason, TimeoutError):
                raise _PassingError(f"no reply within {self.settings.timeout_seconds:g} s") from None
            raise _PassingError(f"no connection ({error})") from None


def _seconds(told: str) -> float:
    """What ``Retry-After`` asks for: a number of seconds, or the time from now to a date; else 0."""
    if told.isdecimal():
        return float(told)
    try:
        return max(0.0, (parsedate_to_datetime(told) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0


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


def _reply(content: bytes) -> Reply:
    try:
        found: Any = json.loads(content)
        text = found["choices"][0]["message"]["content"]
    except (ValueError, RecursionError, LookupError, TypeError):
        raise _PassingError(f"a reply that is no chat completion: {content[:100]!r}") from None
    if not isinstance(text, str):
        raise _PassingError("a reply without text")
    usage = found.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else 0
    return Reply(text, tokens if isinstance(tokens, int) else 0)
