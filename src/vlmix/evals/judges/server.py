"""A judge behind any server that speaks OpenAI's chat completions."""

from __future__ import annotations

from vlmix.core.errors import JudgeError
from vlmix.evals.completions import Completions, NoReplyError, ServerSettings
from vlmix.evals.judges.asking import Question

__all__ = ["ServerJudge", "ServerSettings"]


class ServerJudge:
    """Asks over HTTP; has no state, so that threads may share it."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings, self._client = settings, Completions(settings)

    @property
    def model(self) -> str:
        """The name of the model at the server."""
        return self.settings.model

    def ask(self, question: Question) -> str:
        """The first choice's text.

        Raises:
            JudgeError: if the server refuses, or no try gave a reply; says what the last one gave.

        """
        try:
            return self._client.ask(question.body(self.model)).text
        except NoReplyError as error:
            raise JudgeError(f"judge {error}") from None
