"""OCRBench (Liu et al. 2024): a thousand questions on text in pictures, from 29 data sets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Final, Literal, Self

from vlmix.core.parts import BENCHMARKS
from vlmix.core.sample import Score
from vlmix.evals.benchmarks._layout import first_of, json_lines, picture, row_of, text_of
from vlmix.evals.benchmarks._official import OfficialBenchmark, Question
from vlmix.evals.benchmarks._stored import StoredSettings, stored_rows
from vlmix.evals.benchmarks._tiny import draw, write

_HOW: Final = (
    "The repository Yuliang-Liu/MultimodalOCR has it under OCRBench, and names where the pictures are."
)
_FOLDERS: Final = ("", "OCRBench/", "json_files/")

_IN_TABLE: Final = {"answers": "answer", "type": "question_type", "dataset_name": "dataset"}

_WRITTEN: Final = "what is written in the image?"
_TINY: Final = (
    ("IIIT5K", 7, "IIIT5K/test/1.png", _WRITTEN, "CENTRE", "Regular Text Recognition"),
    ("svt", 7, "svt/image/1.jpg", _WRITTEN, ["under", "Under"], "Regular Text Recognition"),
    ("ORAND", 1, "ORAND/1.png", "what is the number in the image?", 4208, "Digit String Recognition"),
    ("docVQA", 2, "docVQA/1.png", "what is the date?", ["May 1", "1 May"], "Doc-oriented VQA"),
    (
        "HME100k",
        3,
        "HME100k/1.jpg",
        "Please write out the expression of the formula in the image using LaTeX format.",
        "x ^ { 2 } + y",
        "Handwritten Mathematical Expression Recognition",
    ),
)


class OCRBenchSettings(StoredSettings):
    """The folder with ``OCRBench.json`` (or ``OCRBench/OCRBench.json``), pictures in ``OCRBench_Images``.

    Or the table of echo840 or lmms-lab. ``suffix`` ends every question.
    """

    rule: ClassVar = "ocrbench"
    kind: Literal["ocrbench"] = "ocrbench"  # pyright: ignore[reportIncompatibleVariableOverride]
    suffix: str = ""


@BENCHMARKS.register("ocrbench")
class OCRBench(OfficialBenchmark):
    """``accuracy`` is the share of questions that gave their point: a thousandth of the score papers print.

    Tasks are the types of question. The prompt is the question alone (Yuliang-Liu/MultimodalOCR@f5cbec6
    OCRBench/example.py, EvolvingLMMs-Lab/lmms-eval@46a88d8 lmms_eval/tasks/ocrbench/utils.py).
    """

    settings_class = OCRBenchSettings
    settings: OCRBenchSettings
    paper = "OCRBench: On the Hidden Mystery of OCR in Large Multimodal Models (Liu et al., 2024)"
    headlines: ClassVar = dict.fromkeys(
        ("ocrbench_official", "lmms_eval", "lmms_eval_eagle_fork"), "accuracy"
    )

    def lines(self) -> Iterator[tuple[str, object]]:
        """The questions with their number: ids begin again in each data set."""
        files = [f"{folder}OCRBench.json" for folder in _FOLDERS]
        if table := self.settings.table("test", files):
            for number, (place, row) in enumerate(stored_rows(table, ["image"])):
                renamed = {new: row.get(old) for new, old in _IN_TABLE.items()}
                yield place, {**row, **renamed, "number": number}
            return
        path = first_of(self.settings.path, files, _HOW)
        for number, (place, raw) in enumerate(json_lines(path)):
            yield place, {**raw, "number": number} if isinstance(raw, dict) else raw

    def question(self, raw: object) -> Question:
        """One accepted text or several."""
        row = row_of(raw)
        given = row["answers"] if isinstance(row["answers"], list) else [text_of(row, "answers")]
        golds, kind, name = (
            [str(each) for each in given],
            text_of(row, "type"),
            str(row.get("image_path", "")),
        )
        return Question(
            id=str(row["number"]),
            text=text_of(row, "question") + self.settings.suffix,
            images=row.get("image") or [picture(self.settings.path / "OCRBench_Images", name)],
            gold=golds,
            targets=golds,
            fields={"type": kind, "dataset_name": text_of(row, "dataset_name")},
            task=kind,
            group=name,
        )

    def summarise(self, scores: Sequence[Score]) -> Mapping[str, float]:
        """The official points, and the share of all questions that gave one."""
        share = sum(score.value for score in scores) / len(scores) if scores else 0.0
        return {"accuracy": share, **super().summarise(scores)}

    @classmethod
    def tiny(cls, folder: Path) -> Self:
        """Five questions: one text or several, a number, a formula."""
        draw(folder / "OCRBench_Images", *(row[2] for row in _TINY))
        names = ("dataset_name", "id", "image_path", "question", "answers", "type")
        write(folder / "OCRBench.json", [dict(zip(names, row, strict=True)) for row in _TINY])
        return cls(OCRBenchSettings(path=folder))
