"""Made-up facts as plain text, one sentence a row: what the benchmark `cloze` asks for without a file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field

from vlmix.core.interfaces import Source
from vlmix.core.parts import SOURCES
from vlmix.core.sample import Sample, Turn
from vlmix.core.settings import PartSettings
from vlmix.data.facts import MOST, facts


class FactsSettings(PartSettings):
    """How many facts, and which: another ``seed`` gives other names and other words.

    The user's turn is empty of meaning: train with ``chat_template: plain``, which leaves it out.
    """

    kind: Literal["facts"] = "facts"  # pyright: ignore[reportIncompatibleVariableOverride]
    size: int = Field(default=160, ge=1, le=MOST)
    seed: int = Field(default=0, ge=0)

    @classmethod
    def tiny(cls) -> Self:
        """Two names."""
        return cls(size=8)


@SOURCES.register("facts")
class Facts(Source):
    """Sentences such as ``badofi likes red.``; none is ever bad."""

    settings_class = FactsSettings
    settings: FactsSettings

    def __init__(self, settings: FactsSettings) -> None:
        super().__init__(settings)
        self._facts = facts(settings.size, settings.seed)

    def __len__(self) -> int:
        """Facts of the set."""
        return len(self._facts)

    def __getitem__(self, index: int) -> Sample:
        """Sentence ``index``; the target is its last word."""
        if not 0 <= index < len(self):
            raise IndexError(f"fact {index} of {len(self)}")
        fact = self._facts[index]
        name = f"fact-{self.settings.seed}-{index}"
        turns = (Turn("user", ("Say something.",)), Turn("assistant", (f"{fact.passage}.",)))
        return Sample(name, turns, target=fact.passage.rpartition(" ")[2], task=fact.task, group=name)

    @classmethod
    def tiny(cls, folder: Path) -> FactsSettings:
        """Two names; no file is needed."""
        del folder
        return FactsSettings.tiny()
