"""MMMU (Yue et al. 2024): college questions with up to seven pictures, with options or open."""

from __future__ import annotations

import ast
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, Self

from PIL import Image
from pydantic import field_validator

from vlmix.core.errors import InputError, SampleError
from vlmix.core.extras import extra
from vlmix.core.parts import BENCHMARKS
from vlmix.core.sample import ImageRef
from vlmix.evals.benchmarks._asking import (
    BRACKETED,
    BY_LETTER,
    IN_A_WORD,
    letters_of,
    listed,
    texts_in,
    with_answers,
)
from vlmix.evals.benchmarks._layout import text_of
from vlmix.evals.benchmarks._official import OfficialBenchmark, Question
from vlmix.evals.benchmarks._stored import StoredSettings, stored_rows
from vlmix.evals.scoring._fields import lettered

_HOW: Final = "The parquet files of MMMU/MMMU on Hugging Face, all subjects or some, are the published form."
_PICTURES: Final = tuple(f"image_{number}" for number in range(1, 8))
_NAMED: Final = re.compile(r"<image ([1-7])>")
_ID: Final = re.compile(r"[^_]*_(.+)_\d+")

_TINY: Final = (
    ("Art", "What is in <image 1>?", ["a vase", "a bowl"], "B"),
    ("Art", "Which follows <image 1>?", ["<image 2>", "<image 3>", "neither"], "C"),
    ("Math", "What is the sum in <image 1>?", [], "['12', 'twelve']"),
    ("Math", "What is the product in <image 1>?", [], "0.5"),
    ("Biology", "Which organ does <image 1> show?", ["heart", "lung", "liver", "skin"], "D"),
)


class MMMUSettings(StoredSettings):
    """The folder of parquet files; the answers of the test split are not public.

    ``prompt`` is that of MMMU's own script for LLaVA-1.5, or lmms-eval's. ``pictures``: all that a question
    and its options name, as lmms-eval shows them, or the first alone, as that script does.
    """

    rule: ClassVar = "mmmu"
    kind: Literal["mmmu"] = "mmmu"  # pyright: ignore[reportIncompatibleVariableOverride]
    split: str = "validation"
    prompt: Literal["mmmu", "lmms_eval"] = "mmmu"
    pictures: Literal["all", "first"] = "all"

    @field_validator("split")
    @classmethod
    def _can_be_scored(cls, split: str) -> str:
        return with_answers(split, ["validation", "dev"])


@BENCHMARKS.register("mmmu")
class MMMU(OfficialBenchmark):
    """The accuracy over all questions; pictures come first, and the text names them as ``<image 1>``.

    Prompts: MMMU-Benchmark/MMMU@aa9b70d mmmu/run_llava.py with its configs/llava1.5.yaml;
    EvolvingLMMs-Lab/lmms-eval@02bc1c0 lmms_eval/tasks/mmmu/utils.py.
    """

    settings_class = MMMUSettings
    settings: MMMUSettings
    paper = (
        "MMMU: A Massive Multi-discipline Multimodal Understanding and Reasoning Benchmark (Yue et al. 2024)"
    )
    headlines: ClassVar = dict.fromkeys(("mmmu_official", "lmms_eval", "lmms_eval_eagle_fork"), "Overall")

    def lines(self) -> Iterator[tuple[str, object]]:
        """The rows, subject by subject in alphabetical order, as the official script reads them."""
        if not (table := self.settings.table(self.settings.split, [])):
            raise InputError(f"{self.settings.path}: there is no parquet file. {_HOW}")
        return stored_rows(table, _PICTURES)

    def question(self, raw: Any) -> Question:
        """Options and several accepted answers are lists written as Python text."""
        name, kind = text_of(raw, "id"), text_of(raw, "question_type")
        subject = _ID.fullmatch(name)
        chosen = kind == "multiple-choice"
        options = texts_in(_listed(raw["options"])) if chosen else []
        gold = _gold(text_of(raw, "answer"))
        if chosen and gold not in letters_of(options):
            raise SampleError(f"`answer` is {str(gold)[:40]!r}, no letter of {len(options)} options")
        right = gold if isinstance(gold, list) else [gold]
        return Question(
            id=name,
            text=self._text(text_of(raw, "question"), options),
            images=self._images(raw, options),
            gold=gold,
            targets=[*right, f"({gold})"] if chosen else right,
            fields={
                "question_type": kind,
                **({"index2ans": dict(lettered(options))} if chosen else {}),
                **({"subject": subject[1]} if subject else {}),
            },
            options=letters_of(options),
            task=subject[1] if subject else "",
        )

    def _text(self, question: str, options: Sequence[str]) -> str:
        if self.settings.prompt == "lmms_eval":
            return f"{question}{listed(options)}\n{BY_LETTER if options else IN_A_WORD}"
        return f"{question}{listed(options, BRACKETED)}\n{BY_LETTER}" if options else question + IN_A_WORD

    def _images(self, raw: Any, options: Sequence[str]) -> list[ImageRef]:
        named = sorted({int(number) for number in _NAMED.findall("\n".join([raw["question"], *options]))})
        shown = [f"image_{number}" for number in named] if self.settings.pictures == "all" else []
        found = [image for name in shown or _PICTURES[:1] for image in raw.get(name) or []]
        if len(found) < len(shown):
            raise SampleError("it names a picture that its row does not hold")
        return found

    @classmethod
    def tiny(cls, folder: Path) -> Self:
        """Three subjects: with options, among them pictures, and open. No answer is what the rule draws."""
        with extra("data", "a table"):
            import pyarrow as pa
            import pyarrow.parquet as pq
        for subject in dict.fromkeys(each[0] for each in _TINY):
            rows = [
                {
                    "id": f"validation_{subject}_{number}",
                    "question": question,
                    "options": repr(options),
                    "answer": answer,
                    "question_type": "multiple-choice" if options else "open",
                    **{name: _stored(number, question + repr(options), name) for name in _PICTURES[:3]},
                }
                for number, (where, question, options, answer) in enumerate(_TINY)
                if where == subject
            ]
            (folder / subject).mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows), folder / subject / "validation-00000-of-00001.parquet")
        return cls(MMMUSettings(path=folder, cache=folder / "cache"))


def _listed(written: object) -> object:
    """A list written as Python text; anything else as it is."""
    try:
        return ast.literal_eval(written) if isinstance(written, str) else written
    except (SyntaxError, MemoryError, RecursionError):
        raise SampleError(f"no list can be read from {str(written)[:80]!r}") from None


def _gold(answer: str) -> str | list[str]:
    if not answer.startswith("["):
        return answer
    held = _listed(answer)
    return [str(each) for each in held] if isinstance(held, list) else answer


def _stored(number: int, text: str, name: str) -> dict[str, Any] | None:
    """A picture of the tiny set, if its question names it."""
    if f"<{name.replace('_', ' ')}>" not in text:
        return None
    held = io.BytesIO()
    Image.new("RGB", (32, 24), (40 * number, 20 * int(name[-1]), 120)).save(held, format="PNG")
    return {"bytes": held.getvalue(), "path": f"{name}.png"}
