"""GQA (Hudson & Manning 2019): questions made from scene graphs, in several steps of reasoning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, Self

from vlmix.core.parts import BENCHMARKS
from vlmix.core.sample import Json, Sample
from vlmix.evals.benchmarks._asking import IN_A_WORD
from vlmix.evals.benchmarks._layout import entries, first_of, json_whole, picture, row_of, text_of
from vlmix.evals.benchmarks._official import MALFORMED, OfficialBenchmark, Question
from vlmix.evals.benchmarks._stored import StoredSettings, stored_rows
from vlmix.evals.benchmarks._tiny import draw, write

_HOW: Final = (
    "cs.stanford.edu/people/dorarad/gqa has the questions as questions1.2.zip, pictures as images.zip."
)
_FOLDERS: Final = ("", "questions1.2/", "questions/")
_KEPT: Final = ("isBalanced", "question", "types", "groups", "semantic", "entailed")


class GQASettings(StoredSettings):
    """The folder with ``testdev_balanced_questions.json``, itself or in ``questions1.2``, and ``images``.

    Or lmms-lab's tables ``testdev_balanced_instructions`` and ``testdev_balanced_images``. Of an ``_all``
    split, questions that are not balanced only serve consistency. ``suffix`` ends them all.
    """

    rule: ClassVar = "gqa"
    kind: Literal["gqa"] = "gqa"  # pyright: ignore[reportIncompatibleVariableOverride]
    split: Literal["testdev_balanced", "testdev_all", "val_balanced", "val_all", "train_balanced"] = (
        "testdev_balanced"
    )
    suffix: str = IN_A_WORD


@BENCHMARKS.register("gqa")
class GQA(OfficialBenchmark):
    """Accuracy; tasks are the structural types.

    The prompt is that of LLaVA-1.5 (haotian-liu/LLaVA@05f156c docs/Evaluation.md and
    scripts/v1_5/eval/gqa.sh, ``llava_gqa_testdev_balanced.jsonl``). Validity and plausibility come with
    ``eval/val_choices.json``, which is published for val alone.
    """

    settings_class = GQASettings
    settings: GQASettings
    paper = "GQA: A New Dataset for Real-World Visual Reasoning (Hudson & Manning, CVPR 2019)"
    headlines: ClassVar = {
        "gqa_eval_after_llava_convert": "accuracy_percent",
        "gqa_eval_raw": "accuracy_percent",
        "lmms_eval": "exact_match",
    }

    def lines(self) -> Iterator[tuple[str, object]]:
        """The questions in the order of the file, each with its choices where these are published."""
        split = self.settings.split
        names = [f"{folder}{split}_questions.json" for folder in _FOLDERS]
        asked = self.settings.table(self._tier, names, [f"{split}_instructions"])
        shown = self.settings.table(self._tier, names, [f"{split}_images"])
        if asked and shown:
            images = {row.get("id"): row.get("image") for _, row in stored_rows(shown, ["image"])}
            for place, row in stored_rows(asked, []):
                yield place, {**row, "image": images.get(row.get("imageId"))}
            return
        path = first_of(self.settings.path, names, _HOW)
        choices = self._choices()
        for place, raw in entries(path, json_whole(path), "questions"):
            known = choices.get(str(raw.get("id"))) if isinstance(raw, dict) else None
            yield place, raw if known is None or not isinstance(raw, dict) else {**raw, "choices": known}

    def question(self, raw: object) -> Question:
        """All that the rule knows of a question goes along."""
        row = row_of(raw)
        answer, image = text_of(row, "answer"), text_of(row, "imageId")
        return Question(
            id=text_of(row, "id"),
            text=text_of(row, "question") + self.settings.suffix,
            images=row.get("image") or [picture(self.settings.path / "images", f"{image}.jpg")],
            gold=answer,
            targets=[answer],
            fields={name: row[name] for name in (*_KEPT, "choices") if name in row},
            task=str(row["types"]["structural"]),
            group=image,
        )

    def counts(self, sample: Sample) -> bool:
        """The official script scores balanced questions only."""
        return self.protocol == "lmms_eval" or sample.meta.get("isBalanced") is not False

    def unread(self, place: str) -> Mapping[str, Json]:
        """No answer is equal to the gold one."""
        return {**super().unread(place), "gold": MALFORMED}

    def _choices(self) -> dict[str, Any]:
        found = self.settings.path / "eval" / f"{self._tier}_choices.json"
        return row_of(json_whole(found)) if found.is_file() else {}

    @property
    def _tier(self) -> str:
        return self.settings.split.partition("_")[0]

    @classmethod
    def tiny(cls, folder: Path) -> Self:
        """Two pictures, four questions of which one entails another."""
        draw(folder / "images", "1.jpg", "2.jpg")
        made = (
            ("11", "1", "Is the car red?", "yes", "verify", "attr", ["12"]),
            ("12", "1", "What color is the car?", "red", "query", "attr", []),
            ("21", "2", "Is it a dog or a cat?", "dog", "choose", "cat", []),
            ("22", "2", "Are there both cups and ties?", "no", "logical", "obj", ["22"]),
        )
        rows = {
            number: {
                "question": text,
                "imageId": image,
                "answer": answer,
                "isBalanced": True,
                "types": {"structural": structural, "semantic": semantic, "detailed": f"{semantic}Verify"},
                "groups": {"global": semantic, "local": None},
                "semantic": [{"operation": "select", "dependencies": [], "argument": "car (1)"}],
                "entailed": entailed,
                "fullAnswer": f"{answer}.",
            }
            for number, image, text, answer, structural, semantic, entailed in made
        }
        write(folder / "testdev_balanced_questions.json", rows)
        return cls(GQASettings(path=folder))
