"""Which judge marks answers: a server, a cassette, or a server recorded on a cassette."""

from __future__ import annotations

from pathlib import Path
from typing import Self, cast

from pydantic import Field, model_validator

from vlmix.core.settings import Settings
from vlmix.evals.judges.asking import Judge
from vlmix.evals.judges.cassette import CassetteJudge
from vlmix.evals.judges.server import ServerJudge, ServerSettings


class JudgeSettings(Settings):
    """``server`` alone asks, ``cassette`` alone replays what ``model`` said; both record what is new."""

    server: ServerSettings | None = None
    cassette: Path | None = None
    model: str = Field(
        default="", description="whose replies the cassette holds; the server's model if empty"
    )

    @model_validator(mode="after")
    def _names_a_judge(self) -> Self:
        if self.server is None and self.cassette is None:
            raise ValueError("name a `server`, a `cassette`, or both")
        if self.server is None and not self.model:
            raise ValueError("a cassette alone needs the `model` whose replies it holds")
        if self.server is not None and self.model not in {"", self.server.model}:
            raise ValueError(
                f"`model` is {self.model!r} and the server's {self.server.model!r}; leave one out"
            )
        return self

    def judge(self) -> Judge:
        """The judge, ready to be asked.

        Raises:
            InputError: if the cassette is absent or broken.

        """
        if self.server is None:
            return CassetteJudge(cast("Path", self.cassette), self.model)
        server = ServerJudge(self.server)
        return server if self.cassette is None else CassetteJudge(self.cassette, server.model, server)
