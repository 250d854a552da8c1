"""DocVQA (Mathew et al. 2021): questions about scanned pages of an archive."""

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

_HOW: Final = "The Robust Reading Competition (rrc.cvc.uab.es, challenge 17, task 1) has it and the pictures."

_TINY: Final = (
    ("documents/xnbl0037_1.png", "what is the date mentioned?", ["1/8/93"], ["handwritten", "form"]),
    ("documents/xnbl0037_1.png", "Who is it to?", ["P. Carter", "p. carter"], ["layout"]),
    ("documents/pybv0228_81.png", "Which brand is it?", ["ITC Limited", "ITC"], ["table/list"]),
    ("documents/pybv0228_81.png", "What is the total?", ["0.28"], ["table/list"]),
)


class DocVQASettings(StoredSettings):
    """The folder with ``val_v1.0_withQT.json`` (or in ``spdocvqa_qas``, or ``val_v1.0.json``).

    Pictures are in ``spdocvqa_images`` or ``documents``. Or the table ``DocVQA`` of lmms-lab. ``suffix`` ends
    every question.
    """

    rule: ClassVar = "docvqa"
    kind: Literal["docvqa"] = "docvqa"  # pyright: ignore[reportIncompatibleVariableOverride]
    split: str = "val"
    suffix: str = IN_A_WORD

    @field_validator("split")
    @classmethod
    def _can_be_scored(cls, split: str) -> str:
        return with_answers(split, ["val", "train"])


@BENCHMARKS.register("docvqa")
class DocVQA(OfficialBenchmark):
    """ANLS; a task is the first of a question's types.

    Papers report test, whose answers its server keeps. LLaVA-1.5 has no prompt for it: this is lmms-eval's,
    which ends as LLaVA's do (EvolvingLMMs-Lab/lmms-eval@0ad7b14
    lmms_eval/tasks/docvqa/_default_template_docvqa_yaml).
    """

    settings_class = DocVQASettings
    settings: DocVQASettings
    paper = "DocVQA: A Dataset for VQA on Document Images (Mathew et al., WACV 2021)"
    headlines: ClassVar = {
        "rrc_script": "score",
        "lmms_eval": "anls",
        "pix2struct": "anls_percent",
        "m4c_stvqa_anls": "accuracy",
    }

    def lines(self) -> Iterator[tuple[str, object]]:
        """The questions in the order of the file."""
        split = self.settings.split
        files = [f"{split}_v1.0_withQT.json", f"{split}_v1.0.json"]
        names = [folder + file for file in files for folder in ("", "spdocvqa_qas/", f"{split}/")]
        if table := self.settings.table(split, names, ("DocVQA", ".")):
            return stored_rows(table, ["image"])
        return json_entries(first_of(self.settings.path, names, _HOW), "data")

    def question(self, raw: object) -> Question:
        """The older file does not tell the types of its questions."""
        row = row_of(raw)
        golds, stored = answers_of(row), row.get("image")
        name = "" if isinstance(stored, list) else text_of(row, "image")
        folders = ("spdocvqa_images", "documents", f"{self.settings.split}/documents")
        return Question(
            id=text_of(row, "questionId"),
            text=text_of(row, "question") + self.settings.suffix,
            images=stored if isinstance(stored, list) else [page(self.settings.path, folders, name)],
            gold=golds,
            targets=golds,
            task=str(next(iter(row.get("question_types") or []), "")),
            group=name or f"{row.get('docId')}/{row.get('ucsf_document_page_no')}",
        )

    @classmethod
    def tiny(cls, folder: Path) -> Self:
        """Two pages, two questions about each."""
        draw(folder / "documents", *(Path(name).name for name, *_ in _TINY))
        rows = [
            {
                "questionId": 49153 + number,
                "question": text,
                "question_types": kinds,
                "image": name,
                "docId": 14465,
                "answers": answers,
                "data_split": "val",
            }
            for number, (name, text, answers, kinds) in enumerate(_TINY)
        ]
        write(folder / "val_v1.0_withQT.json", {"dataset_name": "SP-DocVQA", "data": rows})
        return cls(DocVQASettings(path=folder))
