"""TextVQA (Singh et al. 2019): questions about text in photographs, each answered by ten people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, Self

from pydantic import field_validator

from vlmix.core.errors import SampleError
from vlmix.core.parts import BENCHMARKS
from vlmix.evals.benchmarks._annotators import best_answers
from vlmix.evals.benchmarks._asking import IN_A_WORD, with_answers
from vlmix.evals.benchmarks._layout import first_of, json_entries, json_lines, picture, row_of, text_of
from vlmix.evals.benchmarks._official import OfficialBenchmark, Question
from vlmix.evals.benchmarks._stored import StoredSettings, stored_rows
from vlmix.evals.benchmarks._tiny import draw, write

_HOW: Final = "textvqa.org has the questions, the Rosetta OCR tokens and the pictures (train_val_images.zip)."
_NO_OCR: Final = "LLaVA's eval.zip has the former, textvqa.org the latter. Set `ocr` to false to ask without."
_LLAVA: Final = "llava_textvqa_val_v051_ocr.jsonl"

_TINY: Final = (
    ("a1", "what is the brand of this camera?", ["dakota"] * 7 + ["dakota digital"] * 3),
    ("a1", "what does the NASA sign say?", ["go, go"] * 10),
    ("b2", "what number is on the shirt?", ["12"] * 6 + ["22"] * 4),
    ("c3", "who made it?", ["nokia"] * 5 + ["Nokia"] * 5),
)
_TINY_OCR: Final = {"a1": ["DAKOTA", "DIGITAL"], "b2": ["12"], "c3": []}


class TextVQASettings(StoredSettings):
    """The folder with ``TextVQA_0.5.1_val.json`` and the pictures in ``train_images``; or lmms-lab's table.

    With ``ocr`` the words that Rosetta read in the picture are told, from
    ``TextVQA_Rosetta_OCR_v0.2_val.json`` or the table; if ``llava_textvqa_val_v051_ocr.jsonl`` is there,
    question and words are those of that file. Else questions are asked ``capitalised``: the first letter
    large, all others small. ``suffix`` ends them.
    """

    rule: ClassVar = "textvqa"
    kind: Literal["textvqa"] = "textvqa"  # pyright: ignore[reportIncompatibleVariableOverride]
    split: str = "val"
    ocr: bool = True
    capitalised: bool = True
    suffix: str = IN_A_WORD

    @field_validator("split")
    @classmethod
    def _can_be_scored(cls, split: str) -> str:
        return with_answers(split, ["val", "train"])


@BENCHMARKS.register("textvqa")
class TextVQA(OfficialBenchmark):
    """Agreement with ten annotators.

    The prompt is that of LLaVA-1.5, which tells the OCR tokens (haotian-liu/LLaVA@524a75b
    llava/eval/eval_textvqa.py and its issue 976); without them it is lmms-eval's
    (EvolvingLMMs-Lab/lmms-eval@2eeb718 lmms_eval/tasks/textvqa/_default_template_textvqa_yaml and utils.py).
    """

    settings_class = TextVQASettings
    settings: TextVQASettings
    paper = "Towards VQA Models That Can Read (Singh et al., CVPR 2019)"
    headlines: ClassVar = {"m4c_evaluator": "accuracy_percent", "lmms_eval": "exact_match"}

    def lines(self) -> Iterator[tuple[str, object]]:
        """The questions in the order of the file."""
        path, split = self.settings.path, self.settings.split
        file = f"TextVQA_0.5.1_{split}.json"
        if table := self.settings.table(split, [file]):
            return stored_rows(table, ["image"])
        return json_entries(first_of(path, [file], _HOW), "data")

    def question(self, raw: object) -> Question:
        """The pictures of val lie among those of train."""
        row = row_of(raw)
        image, golds = text_of(row, "image_id"), [str(answer) for answer in row["answers"]]
        return Question(
            id=text_of(row, "question_id"),
            text=self._told(image, text_of(row, "question"), row.get("ocr_tokens")) + self.settings.suffix,
            images=row.get("image") or [picture(self.settings.path / "train_images", f"{image}.jpg")],
            gold=golds,
            targets=best_answers(self.rule, self.protocol, golds),
            group=image,
        )

    def _told(self, image: str, text: str, tokens: object) -> str:
        """The question, and below it the words read in the picture."""
        begun = text.capitalize() if self.settings.capitalised else text
        if not self.settings.ocr:
            return begun
        if isinstance(tokens, list):
            return f"{begun}\n{_line(tokens)}"
        llava, words = self._words
        found = words.get((image, text.lower() if llava else ""))
        if found is None:
            raise SampleError(f"the file of OCR tokens has none for this question about picture {image!r}")
        return found if llava else f"{begun}\n{found}"

    @cached_property
    def _words(self) -> tuple[bool, Mapping[tuple[str, str], str]]:
        """Whether LLaVA's own file is there; its texts by picture and question, or OCR tokens by picture."""
        split = self.settings.split
        names = [_LLAVA] if split == "val" else []
        path = first_of(self.settings.path, [*names, f"TextVQA_Rosetta_OCR_v0.2_{split}.json"], _NO_OCR)
        llava = path.name == _LLAVA
        return llava, dict(_llava_texts(path) if llava else _rosetta_lines(path))

    @classmethod
    def tiny(cls, folder: Path) -> Self:
        """Three pictures, one of which Rosetta read nothing in, and four questions."""
        draw(folder / "train_images", *(f"{image}.jpg" for image in _TINY_OCR))
        rows = [
            {"question": text, "image_id": image, "question_id": 34602 + number, "answers": answers}
            for number, (image, text, answers) in enumerate(_TINY)
        ]
        write(folder / "TextVQA_0.5.1_val.json", {"data": rows})
        tokens = [{"image_id": image, "ocr_tokens": words} for image, words in _TINY_OCR.items()]
        write(folder / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": tokens})
        return cls(TextVQASettings(path=folder))


def _llava_texts(path: Path) -> Iterator[tuple[tuple[str, str], str]]:
    """Its texts without their last line, the instruction, known as LLaVA's script knows them."""
    for _, raw in json_lines(path):
        if isinstance(raw, dict):
            lines = str(raw.get("text")).split("\n")
            yield (str(raw.get("question_id")), lines[0].lower()), "\n".join(lines[:-1])


def _rosetta_lines(path: Path) -> Iterator[tuple[tuple[str, str], str]]:
    for _, raw in json_entries(path, "data"):
        if isinstance(raw, dict) and isinstance(raw.get("ocr_tokens"), list):
            yield (str(raw.get("image_id")), ""), _line(raw["ocr_tokens"])


def _line(tokens: list[Any]) -> str:
    return "Reference OCR token: " + ", ".join(str(token) for token in tokens)
