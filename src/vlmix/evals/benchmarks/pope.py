"""POPE (Li et al. 2023): does the model see objects that are not there? F1 over three ways to ask."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Final, Literal, Self, get_args

from PIL import Image

from vlmix.core.errors import SampleError
from vlmix.core.parts import BENCHMARKS
from vlmix.core.sample import Json, Score
from vlmix.data.tables import Place
from vlmix.evals.benchmarks._asking import IN_A_WORD
from vlmix.evals.benchmarks._layout import first_of, json_lines, picture, row_of, text_of
from vlmix.evals.benchmarks._official import OfficialBenchmark, Question
from vlmix.evals.benchmarks._stored import StoredSettings, stored_rows

Category = Literal["random", "popular", "adversarial"]
_CATEGORIES: Final[tuple[Category, ...]] = get_args(Category)
_FILE: Final = "coco_pope_{}.json"
_LABELS: Final = ("yes", "no")
_HOW: Final = "The questions are output/coco/coco_pope_*.json of the repository AoiDragon/POPE."

_TINY: Final = (
    ("one.jpg", "dog", "yes"),
    ("one.jpg", "car", "no"),
    ("two.jpg", "cup", "yes"),
    ("two.jpg", "tie", "no"),
)


class PopeSettings(StoredSettings):
    """The folder with ``coco_pope_*.json`` and COCO's ``val2014``; ``suffix`` ends every question."""

    rule: ClassVar = "pope"
    kind: Literal["pope"] = "pope"  # pyright: ignore[reportIncompatibleVariableOverride]
    categories: tuple[Category, ...] = _CATEGORIES
    suffix: str = IN_A_WORD


@BENCHMARKS.register("pope")
class Pope(OfficialBenchmark):
    """``f1`` is the mean F1 score of the categories asked, which papers print.

    The prompt is that of LLaVA-1.5 (haotian-liu/LLaVA@524a75b scripts/v1_5/eval/pope.sh, and its question
    file ``llava_pope_test.jsonl``).
    """

    settings_class = PopeSettings
    settings: PopeSettings
    paper = "Evaluating Object Hallucination in Large Vision-Language Models (Li et al., EMNLP 2023)"
    headlines: ClassVar = {"pope_official": "f1", "lmms_eval": "pope_f1_score"}

    def lines(self) -> Iterator[tuple[str, object]]:
        """The questions of each category, in the order of the settings."""
        if table := self.settings.table(
            "test", ["coco", "output", *map(_FILE.format, _CATEGORIES)], ["data", "."]
        ):
            yield from self._stored(table)
            return
        for category in self.settings.categories:
            name = _FILE.format(category)
            path = first_of(self.settings.path, [name, f"coco/{name}", f"output/coco/{name}"], _HOW)
            for place, raw in json_lines(path):
                yield place, {**raw, "category": category} if isinstance(raw, dict) else raw

    def question(self, raw: object) -> Question:
        """Ids begin again in each category."""
        label, category = text_of(raw, "label"), text_of(raw, "category")
        if label not in _LABELS:
            raise SampleError(f"`label` is {label[:40]!r}, neither yes nor no")
        name = text_of(raw, "image")
        return Question(
            id=f"{category}/{text_of(raw, 'question_id')}",
            text=text_of(raw, "text") + self.settings.suffix,
            images=row_of(raw).get("shown") or [picture(self.settings.path / "val2014", name)],
            gold=label,
            targets=[label],
            fields={"category": category},
            options=("Yes", "No"),
            task=category,
            group=name,
        )

    def _stored(self, table: Place) -> Iterator[tuple[str, object]]:
        """The rows of the categories asked, under the names that the files have."""
        for place, row in stored_rows(table, ["image"]):
            if row["category"] in self.settings.categories:
                renamed = {"text": row["question"], "label": row["answer"], "image": row["image_source"]}
                yield place, {**row, **renamed, "shown": row["image"]}

    def summarise(self, scores: Sequence[Score]) -> Mapping[str, float]:
        """The official figures, and the mean F1 score of their categories."""
        figures = super().summarise(scores)
        found = [value for name, value in figures.items() if name.endswith(".F1 score")]
        return {"f1": sum(found) / len(found), **figures} if found else figures

    def unread(self, place: str) -> Mapping[str, Json]:
        """Its category is that of its file; a yes that was not said lowers every F1 score."""
        return {"category": place.removeprefix("coco_pope_").partition(".")[0], "gold": "yes"}

    @classmethod
    def tiny(cls, folder: Path) -> Self:
        """Two pictures, a question with each answer about both, in every category."""
        (folder / "val2014").mkdir(parents=True, exist_ok=True)
        for name, colour in {"one.jpg": (200, 40, 40), "two.jpg": (40, 80, 200)}.items():
            Image.new("RGB", (32, 24), colour).save(folder / "val2014" / name)
        for category in _CATEGORIES:
            rows = [
                {"question_id": number, "image": image, "text": f"Is there a {thing}?", "label": label}
                for number, (image, thing, label) in enumerate(_TINY, start=1)
            ]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"coco_pope_{category}.json").write_text(lines, encoding="utf-8")
        return cls(PopeSettings(path=folder))
