"""VQAv2 (Goyal et al. 2017): questions about everyday photographs, each answered by ten people."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Final, Literal, Self

from pydantic import field_validator

from vlmix.core.errors import SampleError
from vlmix.core.parts import BENCHMARKS
from vlmix.core.sample import Json
from vlmix.evals.benchmarks._annotators import best_answers
from vlmix.evals.benchmarks._asking import IN_A_WORD, with_answers
from vlmix.evals.benchmarks._layout import first_of, json_entries, picture, row_of, text_of
from vlmix.evals.benchmarks._official import OfficialBenchmark, Question
from vlmix.evals.benchmarks._stored import StoredSettings, stored_rows
from vlmix.evals.benchmarks._tiny import draw, write

_HOW: Final = "visualqa.org has the questions and annotations as v2_Questions_*.zip and v2_Annotations_*.zip."
_PUBLISHED: Final = {"val": "val2014", "train": "train2014"}

_TINY: Final = (
    (1, "Is it raining?", "is it", "yes/no", ["no"] * 10),
    (1, "How many dogs are there?", "how many", "number", ["2"] * 6 + ["3"] * 4),
    (2, "What is he holding?", "what is", "other", ["racket"] * 8 + ["tennis racket", "a racket"]),
    (2, "Is the man's hat red?", "is the man", "yes/no", ["yes"] * 9 + ["no"]),
)


class VQAv2Settings(StoredSettings):
    """The folder with questions, annotations and COCO's ``val2014``, or lmms-lab's table.

    ``suffix`` ends every question.
    """

    rule: ClassVar = "vqav2"
    kind: Literal["vqav2"] = "vqav2"  # pyright: ignore[reportIncompatibleVariableOverride]
    split: str = "val"
    suffix: str = IN_A_WORD

    @field_validator("split")
    @classmethod
    def _can_be_scored(cls, split: str) -> str:
        return with_answers(split, list(_PUBLISHED))


@BENCHMARKS.register("vqav2")
class VQAv2(OfficialBenchmark):
    """Agreement with ten annotators; tasks are the types of answer.

    Papers report test-dev, whose answers its server keeps. The prompt is that of LLaVA-1.5
    (haotian-liu/LLaVA@05f156c docs/Evaluation.md, ``llava_vqav2_mscoco_test-dev2015.jsonl``).
    """

    settings_class = VQAv2Settings
    settings: VQAv2Settings
    paper = "Making the V in VQA Matter (Goyal et al., CVPR 2017)"
    headlines: ClassVar = {
        "vqaeval_official": "overall_percent",
        "llava_convert_then_vqaeval": "overall_percent",
        "lmms_eval": "exact_match",
    }

    def lines(self) -> Iterator[tuple[str, object]]:
        """The questions, each with its annotation."""
        path, split = self.settings.path, self.settings.split
        name = _PUBLISHED[split]
        file = f"v2_mscoco_{name}_annotations.json"
        if table := self.settings.table(split, [file]):
            for place, row in stored_rows(table, ["image"]):
                yield place, {**row, "annotation": row}
            return
        annotations = first_of(path, [file], _HOW)
        questions = first_of(path, [f"v2_OpenEnded_mscoco_{name}_questions.json"], _HOW)
        known = {
            each.get("question_id"): each
            for _, each in json_entries(annotations, "annotations")
            if isinstance(each, dict)
        }
        for place, raw in json_entries(questions, "questions"):
            yield (
                place,
                ({**raw, "annotation": known.get(raw.get("question_id"))} if isinstance(raw, dict) else raw),
            )

    def question(self, raw: object) -> Question:
        """Pictures have COCO's names."""
        row = row_of(raw)
        if row["annotation"] is None:
            raise SampleError(f"there is no annotation for question {row.get('question_id')}")
        annotation = row_of(row["annotation"])
        golds = [text_of(each, "answer") for each in annotation["answers"]]
        fields: dict[str, Json] = {
            name: text_of(annotation, name) for name in ("question_type", "answer_type")
        }
        name, image = _PUBLISHED[self.settings.split], int(row["image_id"])
        return Question(
            id=text_of(row, "question_id"),
            text=text_of(row, "question") + self.settings.suffix,
            images=row.get("image") or [picture(self.settings.path / name, f"COCO_{name}_{image:012d}.jpg")],
            gold=golds,
            targets=best_answers(self.rule, self.protocol, golds),
            fields=fields,
            task=str(fields["answer_type"]),
            group=str(image),
        )

    @classmethod
    def tiny(cls, folder: Path) -> Self:
        """Two photographs, two questions about each, answers of every type."""
        draw(folder / "val2014", *(f"COCO_val2014_{image:012d}.jpg" for image in (1, 2)))
        questions = [
            {"image_id": image, "question": text, "question_id": number}
            for number, (image, text, *_) in enumerate(_TINY)
        ]
        annotations = [
            {
                "question_id": number,
                "image_id": image,
                "question_type": beginning,
                "answer_type": kind,
                "multiple_choice_answer": answers[0],
                "answers": [
                    {"answer_id": place, "answer": answer, "answer_confidence": "yes"}
                    for place, answer in enumerate(answers, start=1)
                ],
            }
            for number, (image, _, beginning, kind, answers) in enumerate(_TINY)
        ]
        write(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
        write(folder / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})
        return cls(VQAv2Settings(path=folder))
