"""ChartQA (Masry et al. 2022): questions about charts, some by people, some made by machine from captions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Final, Literal, Self

from vlmix.core.parts import BENCHMARKS
from vlmix.evals.benchmarks._layout import first_of, json_lines, picture, row_of, text_of
from vlmix.evals.benchmarks._official import OfficialBenchmark, Question
from vlmix.evals.benchmarks._stored import StoredSettings, stored_rows
from vlmix.evals.benchmarks._tiny import draw, write

_HOW: Final = "The repository vis-nlp/ChartQA has it under `ChartQA Dataset`."
_FOLDERS: Final = ("", "ChartQA Dataset/")
Part = Literal["human", "augmented"]

_TINY: Final = {
    "human": (
        ("8127.png", "How many food item is shown in the bar graph?", "14"),
        ("8127.png", "Which line represents data about boys?", "Green line"),
    ),
    "augmented": (
        ("166.png", "What was the share in 2014?", "12.5%"),
        ("3960.png", "What was the value in 2019?", 0.57),
    ),
}


class ChartQASettings(StoredSettings):
    """The folder ``ChartQA Dataset``, or the one around it, or lmms-lab's table.

    ``suffix`` ends every question.
    """

    rule: ClassVar = "chartqa"
    kind: Literal["chartqa"] = "chartqa"  # pyright: ignore[reportIncompatibleVariableOverride]
    split: Literal["test", "val", "train"] = "test"
    parts: tuple[Part, ...] = ("human", "augmented")
    suffix: str = "\nAnswer the question with a single word."


@BENCHMARKS.register("chartqa")
class ChartQA(OfficialBenchmark):
    """Relaxed accuracy; tasks are people's questions and those made by machine.

    LLaVA-1.5 has no prompt for it: this is lmms-eval's (EvolvingLMMs-Lab/lmms-eval@38eb0f3
    lmms_eval/tasks/chartqa/chartqa.yaml). Some versions of that file (@0dc9a47) end as LLaVA's other prompts
    do: set ``suffix`` to ask so.
    """

    settings_class = ChartQASettings
    settings: ChartQASettings
    paper = "ChartQA: A Benchmark for Question Answering about Charts (Masry et al., ACL Findings 2022)"
    headlines: ClassVar = {
        "pix2struct": "relaxed_accuracy_percent",
        "qwen_vl": "relaxed_accuracy",
        "lmms_eval": "relaxed_overall",
    }

    def lines(self) -> Iterator[tuple[str, object]]:
        """The questions of each part, in the order of the settings, with their number."""
        split = self.settings.split
        if table := self.settings.table(split, [f"{folder}{split}" for folder in _FOLDERS]):
            for number, (place, row) in enumerate(stored_rows(table, ["image"])):
                part = str(row.get("type")).removesuffix("_test")
                named = {
                    "part": part,
                    "id": str(number),
                    "query": row.get("question"),
                    "label": row.get("answer"),
                }
                if part in self.settings.parts:
                    yield place, {**row, **named}
            return
        for part in self.settings.parts:
            names = [f"{folder}{split}/{split}_{part}.json" for folder in _FOLDERS]
            path = first_of(self.settings.path, names, _HOW)
            for number, (place, raw) in enumerate(json_lines(path)):
                here = {"part": part, "id": f"{part}/{number}", "pictures": path.parent / "png"}
                yield place, {**raw, **here} if isinstance(raw, dict) else raw

    def question(self, raw: object) -> Question:
        """The rule calls the parts human_test and augmented_test, whatever the split."""
        row = row_of(raw)
        label, part, name = text_of(row, "label"), text_of(row, "part"), str(row.get("imgname", ""))
        return Question(
            id=text_of(row, "id"),
            text=text_of(row, "query") + self.settings.suffix,
            images=row.get("image") or [picture(row["pictures"], name)],
            gold=label,
            targets=[label],
            fields={"type": f"{part}_test"},
            task=part,
            group=name,
        )

    @classmethod
    def tiny(cls, folder: Path) -> Self:
        """Two questions by people, two made by machine: numbers, a percentage and text."""
        draw(folder / "test" / "png", "8127.png", "166.png", "3960.png")
        for part, rows in _TINY.items():
            named = [{"imgname": name, "query": text, "label": label} for name, text, label in rows]
            write(folder / "test" / f"test_{part}.json", named)
        return cls(ChartQASettings(path=folder))
