"""NLVR2 (Suhr et al. 2019): is a sentence true of two photographs? Accuracy, and whole sentences right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Final, Literal, Self

from pydantic import field_validator

from vlmix.core.errors import SampleError
from vlmix.core.parts import BENCHMARKS
from vlmix.evals.benchmarks._layout import first_of, json_lines, picture, text_of
from vlmix.evals.benchmarks._official import OfficialBenchmark, OfficialSettings, Question
from vlmix.evals.benchmarks._tiny import draw

Split = Literal["dev", "test1", "test2"]
Subset = Literal["all", "balanced", "unbalanced"]

_SENTENCE: Final = "{sentence}"
_LABELS: Final = ("True", "False")
_HOW: Final = (
    "The sentences are nlvr2/data of the repository lil-lab/nlvr, whose README says how the pictures are had."
)


class Nlvr2Settings(OfficialSettings):
    """The folder with ``SPLIT.json``, and the pictures in ``SPLIT`` or ``images`` inside it.

    ``question`` has ``{sentence}`` in it. ``subset`` are the pairs that are shown with true and with false
    sentences, or those that are not: files of their own.
    """

    rule: ClassVar = "nlvr2"
    kind: Literal["nlvr2"] = "nlvr2"  # pyright: ignore[reportIncompatibleVariableOverride]
    split: Split = "test1"
    subset: Subset = "all"
    question: str = (
        "Here is a statement describing 2 images: {sentence} Is it true or false?\n"
        "Answer with True or False and nothing else."
    )

    @field_validator("question")
    @classmethod
    def _asks_the_sentence(cls, question: str) -> str:
        if _SENTENCE not in question:
            raise ValueError(f"`question` has no {_SENTENCE} in it")
        return question


@BENCHMARKS.register("nlvr2")
class Nlvr2(OfficialBenchmark):
    """``accuracy`` over all answers, beside the share of sentences that are right of all their pairs.

    There is no published prompt for a model that answers in words: the question is that of Mantis' data
    (TIGER-AI-Lab/Mantis, NLVR2), and what follows it asks for the words that the script compares. Models that
    were taught the bare sentence get ``question: "{sentence}"``.
    """

    settings_class = Nlvr2Settings
    settings: Nlvr2Settings
    paper = "A Corpus for Reasoning About Natural Language Grounded in Photographs (Suhr et al., ACL 2019)"
    headlines: ClassVar = {"nlvr2_metrics": "accuracy"}

    def lines(self) -> Iterator[tuple[str, object]]:
        """Sentences with their pairs, in the order of the file."""
        split, subset = self.settings.split, self.settings.subset
        name = f"{split}.json" if subset == "all" else f"{subset}/{subset}_{split}.json"
        places = [f"{above}{name}" for above in ("", "data/", "nlvr2/data/", "nlvr/nlvr2/data/")]
        yield from json_lines(first_of(self.settings.path, places, _HOW))

    def question(self, raw: object) -> Question:
        """The names of a pair's pictures follow from the id; the group is the sentence's set of pictures."""
        name, label = text_of(raw, "identifier"), text_of(raw, "label")
        parts = name.split("-")
        if len(parts) != 4:
            raise SampleError(f"`identifier` is {name[:40]!r}, not of four parts")
        if label not in _LABELS:
            raise SampleError(f"`label` is {label[:40]!r}, neither True nor False")
        pair, folder = "-".join(parts[:3]), self._folder
        return Question(
            id=name,
            text=self.settings.question.replace(_SENTENCE, text_of(raw, "sentence")),
            images=[picture(folder, f"{pair}-img{side}.png") for side in (0, 1)],
            gold=label,
            targets=[label],
            options=_LABELS,
            group="-".join(parts[:2]),
        )

    @property
    def _folder(self) -> Path:
        """Where the pictures are: in a folder of their split, in one for all, or beside the sentences."""
        path, split = self.settings.path, self.settings.split
        inside = (split, f"{split}_img", f"images/{split}", "images", "nlvr2/images")
        places = [path / place for place in inside]
        return next((place for place in places if place.is_dir()), path / split)

    @classmethod
    def tiny(cls, folder: Path) -> Self:
        """Three sets of pictures, two sentences of the first, each sentence with two pairs."""
        rows, labels = [], ("True", "False")
        for number, sentence in ((3, 0), (3, 1), (5, 0), (8, 0)):
            for pair in (0, 1):
                draw(folder / "test1", *(f"test1-{number}-{pair}-img{side}.png" for side in (0, 1)))
                label = labels[(number + pair) % 2]
                words = f"The left picture shows {number} things, the right one {sentence}."
                name = f"test1-{number}-{pair}-{sentence}"
                rows.append(
                    {"identifier": name, "sentence": words, "label": label, "validation": {"1": label}}
                )
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "test1.json").write_text(lines, encoding="utf-8")
        return cls(Nlvr2Settings(path=folder))
