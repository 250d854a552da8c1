"""InfographicVQA (Mathew et al. 2022): questions about posters that tell facts in pictures and numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Final, Literal, Self

from pydantic import field_validator

from vlmix.core.parts import BENCHMARKS
from vlmix.evals.benchmarks._asking import IN_A_WORD, with_answers
from vlmix.evals.benchmarks._layout import first_of, json_entries, row_of, text_of
from vlmix.evals.benchmarks._official import OfficialBenchmark, Question
from vlmix.evals.benchmarks._pages import answers_of, page
from vlmix.evals.benchmarks._stored import StoredSettings, stored_rows
from vlmix.evals.benchmarks._tiny import draw, write

_HOW: Final = "The Robust Reading Competition (rrc.cvc.uab.es, challenge 17, task 3) has it and the pictures."
_FILES: Final = {
    "val": ("infographicsVQA_val_v1.0_withQT.json",),
    "train": ("infographicsVQA_train_v1.0.json", "infographicVQA_train_v1.0.json"),
}
_PICTURES: Final = ("infographicsvqa_images", "infographicVQA_train_v1.0_images", "images")
_KINDS: Final = ("answer_type", "evidence", "operation/reasoning")

_TINY: Final = (
    ("37313.jpeg", "Which platform has a heavy female audience?", ["pinterest"], ["text"], []),
    ("37313.jpeg", "How many more use it?", ["12", "twelve"], ["figure"], ["arithmetic"]),
    ("20471.jpeg", "Which two are blue?", ["a, b", "b, a"], ["table/list"], ["comparison"]),
)


class InfoVQASettings(StoredSettings):
    """The folder with ``infographicsVQA_val_v1.0_withQT.json`` or with it in ``infographicsvqa_qas``.

    Pictures are in ``infographicsvqa_images`` or ``images``. Or the table ``InfographicVQA`` of lmms-lab.
    ``suffix`` ends every question.
    """

    rule: ClassVar = "infovqa"
    kind: Literal["infovqa"] = "infovqa"  # pyright: ignore[reportIncompatibleVariableOverride]
    split: str = "val"
    suffix: str = IN_A_WORD

    @field_validator("split")
    @classmethod
    def _can_be_scored(cls, split: str) -> str:
        return with_answers(split, list(_FILES))


@BENCHMARKS.register("infovqa")
class InfoVQA(OfficialBenchmark):
    """ANLS; a task is the first of a question's types of answer.

    Papers report test, whose answers its server keeps. LLaVA-1.5 has no prompt for it: this is lmms-eval's,
    which ends as LLaVA's do (EvolvingLMMs-Lab/lmms-eval@471d28d
    lmms_eval/tasks/infovqa/_default_template_infovqa_yaml).
    """

    settings_class = InfoVQASettings
    settings: InfoVQASettings
    paper = "InfographicVQA (Mathew et al., WACV 2022)"
    headlines: ClassVar = {
        "rrc_script": "score",
        "lmms_eval": "anls",
        "pix2struct": "anls_percent",
        "m4c_stvqa_anls": "accuracy",
    }

    def lines(self) -> Iterator[tuple[str, object]]:
        """The questions in the order of the file."""
        split = self.settings.split
        names = [folder + file for file in _FILES[split] for folder in ("", "infographicsvqa_qas/")]
        if table := self.settings.table(split, names, ("InfographicVQA", ".")):
            return stored_rows(table, ["image"])
        return json_entries(first_of(self.settings.path, names, _HOW), "data")

    def question(self, raw: object) -> Question:
        """Only the questions of val say of what kinds they are."""
        row = row_of(raw)
        golds, stored = answers_of(row), row.get("image")
        name = str(row.get("image_url")) if stored else text_of(row, "image_local_name")
        return Question(
            id=text_of(row, "questionId"),
            text=text_of(row, "question") + self.settings.suffix,
            images=stored or [page(self.settings.path, _PICTURES, name)],
            gold=golds,
            targets=golds,
            fields={kind: row[kind] for kind in _KINDS if kind in row},
            task=str(next(iter(row.get("answer_type") or []), "")),
            group=name,
        )

    @classmethod
    def tiny(cls, folder: Path) -> Self:
        """Two posters and three questions: one span, several, and none."""
        draw(folder / "infographicsvqa_images", *(name for name, *_ in _TINY))
        kinds = ("single span", "non-extractive", "multi-span")
        rows = [
            {
                "questionId": 98313 + number,
                "question": text,
                "image_local_name": name,
                "answers": answers,
                "answer_type": [kind],
                "evidence": evidence,
                "operation/reasoning": operation,
                "data_split": "val",
            }
            for number, ((name, text, answers, evidence, operation), kind) in enumerate(
                zip(_TINY, kinds, strict=True)
            )
        ]
        write(folder / "infographicsVQA_val_v1.0_withQT.json", {"data": rows})
        return cls(InfoVQASettings(path=folder))
