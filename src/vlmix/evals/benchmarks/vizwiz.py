"""VizWiz (Gurari et al. 2018): blind people's photographs and questions, many of which cannot be answered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, Self

from vlmix.core.errors import InputError
from vlmix.core.parts import BENCHMARKS
from vlmix.evals.benchmarks._annotators import best_answers
from vlmix.evals.benchmarks._asking import IN_A_WORD
from vlmix.evals.benchmarks._layout import first_of, json_lines, picture, row_of, text_of
from vlmix.evals.benchmarks._official import OfficialBenchmark, Question
from vlmix.evals.benchmarks._stored import StoredSettings, stored_rows
from vlmix.evals.benchmarks._tiny import draw, write

_HOW: Final = "vizwiz.org has it in Annotations.zip, and the pictures as val.zip."
_FOLDERS: Final = ("", "Annotations/", "annotations/")

_TINY: Final = (
    ("What is this?", "other", 1, ["soda"] * 7 + ["can"] * 3),
    ("Can you tell me how many people I see?", "number", 1, ["2"] * 10),
    ("What does it say?", "unanswerable", 0, ["unanswerable"] * 9 + ["blurry"]),
    ("Is the light on?", "yes/no", 1, ["no"] * 6 + ["unanswerable"] * 4),
)


class VizWizSettings(StoredSettings):
    """The folder with ``val.json``, itself or in ``Annotations``, and ``val``; or lmms-lab's table.

    Questions are asked ``capitalised``: the first letter large, all others small. ``suffix`` ends them.
    """

    rule: ClassVar = "vizwiz"
    kind: Literal["vizwiz"] = "vizwiz"  # pyright: ignore[reportIncompatibleVariableOverride]
    split: Literal["val", "train", "test"] = "val"
    capitalised: bool = True
    suffix: str = "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + IN_A_WORD


@BENCHMARKS.register("vizwiz")
class VizWiz(OfficialBenchmark):
    """Agreement with ten annotators; tasks are the types of answer.

    The prompt is lmms-eval's for LLaVA-1.5 (EvolvingLMMs-Lab/lmms-eval@2f636e7
    lmms_eval/tasks/vizwiz_vqa/_default_template_vqa_yaml and utils.py, which capitalises). LLaVA asks the
    test split, whose answers only a file called ``VQA_test.json`` has.
    """

    settings_class = VizWizSettings
    settings: VizWizSettings
    paper = "VizWiz Grand Challenge: Answering Visual Questions from Blind People (Gurari et al., CVPR 2018)"
    headlines: ClassVar = {
        "vizwiz_api": "overall_percent",
        "llava_convert_then_vizwiz_api": "overall_percent",
        "lmms_eval": "exact_match",
    }

    def lines(self) -> Iterator[tuple[str, object]]:
        """The questions of the split, if the file has answers."""
        split = self.settings.split
        files = ["VQA_test.json", "test.json"] if split == "test" else [f"{split}.json"]
        names = [folder + file for file in files for folder in _FOLDERS]
        if table := self.settings.table(split, names):
            for place, row in stored_rows(table, ["image"]):
                yield place, _as_published(row)
            return
        path = first_of(self.settings.path, names, _HOW)
        found = list(json_lines(path))
        rows = [raw for _, raw in found if isinstance(raw, dict)]
        if rows and not any("answers" in raw for raw in rows):
            raise InputError(f"{path} has no answers: those of test are kept back. Set `split` to val.")
        yield from found

    def question(self, raw: object) -> Question:
        """A question is known by its picture: there is one for each."""
        row = row_of(raw)
        name, text, kind = text_of(row, "image"), text_of(row, "question"), text_of(row, "answer_type")
        golds = [text_of(each, "answer") for each in row["answers"]]
        return Question(
            id=name,
            text=(text.capitalize() if self.settings.capitalised else text) + self.settings.suffix,
            images=row.get("pictures") or [picture(self.settings.path / self.settings.split, name)],
            gold=golds,
            targets=best_answers(self.rule, self.protocol, golds),
            fields={name: row[name] for name in ("answer_type", "answerable") if name in row},
            task=kind,
            group=name,
        )

    @classmethod
    def tiny(cls, folder: Path) -> Self:
        """Four pictures, a question about each, answers of every type."""
        names = [f"VizWiz_val_{number:08d}.jpg" for number in range(len(_TINY))]
        draw(folder / "val", *names)
        rows = [
            {
                "image": name,
                "question": text,
                "answers": [{"answer": answer, "answer_confidence": "yes"} for answer in answers],
                "answer_type": kind,
                "answerable": answerable,
            }
            for name, (text, kind, answerable, answers) in zip(names, _TINY, strict=True)
        ]
        write(folder / "Annotations" / "val.json", rows)
        return cls(VizWizSettings(path=folder))


def _as_published(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the table with the names of the published file; it does not say which can be answered."""
    return {
        "image": row.get("question_id"),
        "question": row.get("question"),
        "answers": [{"answer": answer} for answer in row.get("answers") or []],
        "answer_type": row.get("category"),
        "pictures": row.get("image"),
    }
