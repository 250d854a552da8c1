"""LLaVA-Bench, In-the-Wild (Liu et al. 2023): sixty open questions, whose answers stand beside GPT-4's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, Self

from vlmix.core.errors import SampleError
from vlmix.core.parts import BENCHMARKS
from vlmix.core.sample import Json
from vlmix.evals.benchmarks._judged import JudgedBenchmark, JudgedSettings
from vlmix.evals.benchmarks._layout import first_of, json_lines, picture, row_of, text_of
from vlmix.evals.benchmarks._official import MALFORMED, Question
from vlmix.evals.benchmarks._stored import stored_rows
from vlmix.evals.benchmarks._tiny import draw

_QUESTIONS: Final = "questions.jsonl"
_ANSWERS: Final = "answers_gpt4.jsonl"
_CONTEXT: Final = "context.jsonl"
_IN_TABLE: Final = {"text": "question", "answer": "gpt_answer", "context": "caption"}
_HOW: Final = "It is a file of the data set liuhaotian/llava-bench-in-the-wild."


class LlavaBenchSettings(JudgedSettings):
    """The folder with ``questions.jsonl``, ``answers_gpt4.jsonl``, ``context.jsonl`` and ``images``."""

    rule: ClassVar = "llava_bench"
    kind: Literal["llava_bench"] = "llava_bench"  # pyright: ignore[reportIncompatibleVariableOverride]


@BENCHMARKS.register("llava_bench")
class LlavaBench(JudgedBenchmark):
    """The answers' marks in percent of those of GPT-4's answers; without a judge the mean ROUGE-L with these.

    The question is asked as it is (haotian-liu/LLaVA, ``docs/Evaluation.md``).
    """

    settings_class = LlavaBenchSettings
    settings: LlavaBenchSettings
    paper = "Visual Instruction Tuning (Liu et al., NeurIPS 2023)"
    headlines: ClassVar = {"gpt4": "relative_percent.all", "rouge_l": "all"}

    def lines(self) -> Iterator[tuple[str, object]]:
        """Each question with GPT-4's answer to it and the description of its picture."""
        folder = self.settings.path
        if table := self.settings.table("train", [_QUESTIONS, _ANSWERS, _CONTEXT]):
            for place, row in stored_rows(table, ["image"]):
                renamed = {new: row.get(old) for new, old in _IN_TABLE.items()}
                yield place, {**row, **renamed}
            return
        answers = _by(first_of(folder, [_ANSWERS], _HOW), "question_id", "text")
        contexts = _by(first_of(folder, [_CONTEXT], _HOW), "image", "caption")
        for place, raw in json_lines(first_of(folder, [_QUESTIONS], _HOW)):
            if isinstance(raw, dict):
                answer = answers.get(str(raw.get("question_id")))
                context = contexts.get(str(raw.get("image")))
                yield place, {**raw, "answer": answer, "context": context}
            else:
                yield place, raw

    def question(self, raw: object) -> Question:
        """A question without its answer or description cannot be marked."""
        row = row_of(raw)
        text, category, shown = text_of(row, "text"), text_of(row, "category"), row["image"]
        name = str(row["image_id"] if isinstance(shown, list) else shown)
        if not isinstance(row["answer"], str) or not row["answer"].strip():
            raise SampleError(f"{_ANSWERS} has no answer to it")
        context = row["context"]
        if not isinstance(context, str | list):
            raise SampleError(f"{_CONTEXT} does not describe {name[:60]!r}")
        return Question(
            id=text_of(row, "question_id"),
            text=text,
            images=shown if isinstance(shown, list) else [picture(self.settings.path / "images", shown)],
            gold=row["answer"],
            targets=[row["answer"]],
            fields={"question": text, "category": category, "caption": context},
            task=category,
            group=name,
        )

    def unread(self, place: str) -> Mapping[str, Json]:
        """A category of its own, beside which it counts in all."""
        return {"question": place, "category": MALFORMED, "caption": ""}

    @classmethod
    def tiny(cls, folder: Path) -> Self:
        """Two pictures, two questions about each, one description with several lines."""
        draw(folder / "images", "001.jpg", "002.jpg")
        asked = [
            ("001.jpg", "What is this called?", "conv", "It is a lighthouse on a cliff."),
            (
                "001.jpg",
                "Describe the picture.",
                "detail",
                "A white lighthouse stands on a steep green cliff.",
            ),
            ("002.jpg", "What could happen next?", "complex", "The rider may have to wait for the red lamp."),
            ("002.jpg", "Which colour is the lamp?", "conv", "The lamp is red."),
        ]
        questions = [
            {"question_id": number, "image": image, "text": text, "category": category}
            for number, (image, text, category, _) in enumerate(asked)
        ]
        answers = [{"question_id": number, "text": row[-1]} for number, row in enumerate(asked)]
        contexts = [
            {"id": "001", "image": "001.jpg", "caption": "A lighthouse."},
            {"id": "002", "image": "002.jpg", "caption": ["A rider at a crossing.", "A red lamp."]},
        ]
        for name, rows in ((_QUESTIONS, questions), (_ANSWERS, answers), (_CONTEXT, contexts)):
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return cls(LlavaBenchSettings(path=folder))


def _by(path: Path, key: str, field: str) -> dict[str, Any]:
    """One field of each row by another; a row that is broken is missed where it is wanted."""
    rows = (raw for _, raw in json_lines(path) if isinstance(raw, dict))
    return {str(raw[key]): raw.get(field) for raw in rows if key in raw}
