"""MathVista (Lu et al. 2024): mathematics in pictures, with options or with a number or list to give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, Self

from pydantic import field_validator

from vlmix.core.errors import SampleError
from vlmix.core.parts import BENCHMARKS
from vlmix.core.sample import Json
from vlmix.evals.benchmarks._asking import BRACKETED, letters_of, listed, texts_in, with_answers
from vlmix.evals.benchmarks._layout import entries, first_of, json_whole, picture, text_of
from vlmix.evals.benchmarks._official import OfficialBenchmark, Question
from vlmix.evals.benchmarks._stored import StoredSettings, stored_rows
from vlmix.evals.benchmarks._tiny import draw, write

_HOW: Final = (
    "It is data/ of the repository lupantech/MathVista, with images.zip of AI4Math/MathVista unpacked."
)
_DECODED: Final = "decoded_image"
_KNOWN: Final = ("language", "source", "category", "task", "context", "grade", "skills")
_AT_THE_END: Final = {
    "multi_choice": "and provide the correct option letter, e.g., A, B, C, D, at the end.",
    "integer": "requiring an integer answer and provide the final value, e.g., 1, 2, 3, at the end.",
    "float 1": "requiring a floating-point number with one decimal place and provide the final value, e.g., "
    "1.2, 1.3, 1.4, at the end.",
    "float 2": "requiring a floating-point number with two decimal places and provide the final value, e.g., "
    "1.23, 1.34, 1.45, at the end.",
    "list": "requiring a Python list as an answer and provide the final list, e.g., [1, 2, 3], "
    "[1.2, 1.3, 1.4], at the end.",
}
_DIRECTLY: Final = {
    "multi_choice": "Answer with the option's letter from the given choices directly.",
    "integer": "Answer the question using a single integer number.",
    "float 1": "Answer the question using a single floating-point number with one decimal place.",
    "float 2": "Answer the question using a single floating-point number with two decimal places.",
    "list": "Answer the question using a Python list.",
}

_TINY: Final = (
    ("Which is larger?", ["the red one", "the blue one"], None, "text", None, "the blue one", "statistics"),
    ("How long is it?", None, "cm", "integer", None, "7", "geometry"),
    ("What is x?", None, None, "float", 1, "1.5", "algebra"),
    ("What is y?", None, None, "float", 2, "0.25", "algebra"),
    ("Between which years?", None, None, "list", None, "[2007, 2008]", "statistics"),
)


class MathVistaSettings(StoredSettings):
    """The folder with ``testmini.json`` and ``images``, or the table of Hugging Face.

    ``prompt``: ``format`` asks for the bare answer, as lmms-eval does; ``query`` is the published one, with
    the hint first, and ``solution`` what ``evaluation/build_query.py`` builds. The last two make a model
    explain itself, and the official script has a language model find the answer in it: here nothing does.
    """

    rule: ClassVar = "mathvista"
    kind: Literal["mathvista"] = "mathvista"  # pyright: ignore[reportIncompatibleVariableOverride]
    split: str = "testmini"
    prompt: Literal["format", "query", "solution"] = "format"

    @field_validator("split")
    @classmethod
    def _can_be_scored(cls, split: str) -> str:
        return with_answers(split, ["testmini"])


@BENCHMARKS.register("mathvista")
class MathVista(OfficialBenchmark):
    """The share of answers that equal the published one.

    Prompts: lupantech/MathVista@1d27dac data/query.json and @c8221f0 evaluation/build_query.py without
    examples; ``format-prompt`` of EvolvingLMMs-Lab/lmms-eval@0893c50
    lmms_eval/tasks/mathvista/mathvista_evals.py.
    """

    settings_class = MathVistaSettings
    settings: MathVistaSettings
    paper = "MathVista: Evaluating Mathematical Reasoning of Foundation Models (Lu et al., ICLR 2024)"
    headlines: ClassVar = dict.fromkeys(
        ("mathvista_official", "mathvista_official_ignore_empty", "mgm", "lmms_eval"), "average"
    )

    def lines(self) -> Iterator[tuple[str, object]]:
        """The problems in the order of the file."""
        split = self.settings.split
        names = [f"{split}.json", f"data/{split}.json"]
        if table := self.settings.table(split, names):
            return stored_rows(table, [_DECODED])
        file = first_of(self.settings.path, names, _HOW)
        return entries(file, json_whole(file), "problems")

    def question(self, raw: Any) -> Question:
        """Its text, hint and kind of answer."""
        options = texts_in(raw["choices"]) if raw.get("choices") else []
        gold, kind = text_of(raw, "answer"), text_of(raw, "question_type")
        if kind not in {"multi_choice", "free_form"} or (kind == "multi_choice" and gold not in options):
            raise SampleError(
                f"`question_type` {kind[:40]!r} and `answer` {gold[:40]!r} do not go with the options"
            )
        known = raw.get("metadata") or {}
        task = str(known.get("task", ""))
        letters = letters_of(options)
        right = letters[options.index(gold)] if kind == "multi_choice" else ""
        stored = raw.get(_DECODED)
        return Question(
            id=text_of(raw, "pid"),
            text=self._text(raw, options),
            images=stored if stored is not None else [picture(self._root, raw["image"])],
            gold=gold,
            targets=[right, f"({right})"] if right else [gold],
            fields={
                **{name: known[name] for name in _KNOWN if name in known},
                "question_type": kind,
                "answer_type": text_of(raw, "answer_type"),
                "precision": raw.get("precision"),
                "choices": options or None,
            },
            options=letters if kind == "multi_choice" else (),
            task=task,
            language="zh" if known.get("language") == "chinese" else "en",
        )

    @property
    def _root(self) -> Path:
        path = self.settings.path
        return path if (path / f"{self.settings.split}.json").exists() else path / "data"

    def _text(self, raw: Any, options: Sequence[str]) -> str:
        kind = raw["answer_type"] if raw["question_type"] == "free_form" else raw["question_type"]
        if kind == "float":
            kind = f"float {int(raw['precision'])}"
        asked = text_of(raw, "question") + (f" (Unit: {raw['unit']})" if raw.get("unit") else "")
        if self.settings.prompt == "format":
            return "\n".join(filter(None, [asked + listed(options), _DIRECTLY.get(kind, "")]))
        asked = f"Question: {asked}" + (f"\nChoices:{listed(options, BRACKETED)}" if options else "")
        hint = f"Hint: Please answer the question {_AT_THE_END[kind]}" if kind in _AT_THE_END else ""
        parts = [hint, asked] if self.settings.prompt == "query" else [asked, hint, "Solution:"]
        return "\n".join(filter(None, parts))

    @classmethod
    def tiny(cls, folder: Path) -> Self:
        """A problem of each kind of answer."""
        problems = dict[str, Mapping[str, Json]]()
        for number, (question, choices, unit, form, digits, answer, task) in enumerate(_TINY, start=1):
            problems[str(number)] = {
                "pid": str(number),
                "question": question,
                "image": f"images/{number}.jpg",
                "choices": choices,
                "unit": unit,
                "precision": digits,
                "answer": answer,
                "question_type": "multi_choice" if choices else "free_form",
                "answer_type": form,
                "metadata": {"task": task, "language": "english", "skills": [task]},
            }
        draw(folder / "images", *(f"{number}.jpg" for number in problems))
        write(folder / "testmini.json", problems)
        return cls(MathVistaSettings(path=folder))
