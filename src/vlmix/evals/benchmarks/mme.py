"""MME (Fu et al. 2023): yes or no to two statements about each picture, in fourteen tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Final, Literal, Self, get_args

from vlmix.core.errors import InputError, SampleError
from vlmix.core.parts import BENCHMARKS
from vlmix.core.sample import ImageRef, Json
from vlmix.data.tables import Place
from vlmix.evals.benchmarks._asking import IN_A_WORD
from vlmix.evals.benchmarks._layout import text_lines
from vlmix.evals.benchmarks._official import OfficialBenchmark, Question
from vlmix.evals.benchmarks._stored import StoredSettings, stored_rows
from vlmix.evals.benchmarks._tiny import draw

Task = Literal[
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
]
_ALL: Final[tuple[Task, ...]] = get_args(Task)
_COGNITION: Final = frozenset(_ALL[10:])
_PLACES: Final = (
    "MME_Benchmark_release_version/MME_Benchmark",
    "MME_Benchmark_release_version",
    "MME_Benchmark",
    ".",
)
_ENDINGS: Final = frozenset({".jpg", ".jpeg", ".png"})
_ASKED_FOR: Final = "Please answer yes or no."
_HOW: Final = (
    "MME_Benchmark_release_version is had as the repository BradyFU/Awesome-Multimodal-Large-Language-Models "
    "says in its branch Evaluation."
)


class MMESettings(StoredSettings):
    """The folder with ``MME_Benchmark_release_version``, or that itself; ``tasks`` are asked in their order.

    ``prompt`` is LLaVA's, or the statement as it is published, which ends in "Please answer yes or no."
    """

    rule: ClassVar = "mme"
    kind: Literal["mme"] = "mme"  # pyright: ignore[reportIncompatibleVariableOverride]
    tasks: tuple[Task, ...] = _ALL
    prompt: Literal["llava", "official"] = "llava"


@BENCHMARKS.register("mme")
class MME(OfficialBenchmark):
    """The sum of points over the tasks of perception, or those of cognition if only these are asked.

    LLaVA-1.5 asks without the published ending and with its own (haotian-liu/LLaVA@05f156c
    docs/Evaluation.md); lmms-eval and Eagle do the same (EvolvingLMMs-Lab/lmms-eval@306a8b4
    lmms_eval/tasks/mme/utils.py).
    """

    settings_class = MMESettings
    settings: MMESettings
    paper = "MME: A Comprehensive Evaluation Benchmark for Multimodal Large Language Models (Fu et al., 2023)"
    headlines: ClassVar = {
        "mme_eval_tool": "Perception.total",
        "lmms_eval": "Perception",
        "lmms_eval_eagle_fork": "Perception",
    }

    def __init__(self, settings: MMESettings) -> None:
        super().__init__(settings)
        if _COGNITION.issuperset(settings.tasks):
            self.headline = self.headline.replace("Perception", "Cognition")

    def lines(self) -> Iterator[tuple[str, object]]:
        """The statements task by task and picture by picture; pictures lie beside them or in ``images``."""
        if table := self.settings.table("test", [*_PLACES[:3], *self.settings.tasks]):
            yield from self._stored(table)
            return
        for task in self.settings.tasks:
            folder = self._folder(task)
            asked, shown = folder / "questions_answers_YN", folder / "images"
            asked, shown = (asked, shown) if asked.is_dir() else (folder, folder)
            pictures = {path.stem: path for path in _pictures(shown)}
            for file in sorted(asked.glob("*.txt")):
                image = ImageRef(pictures.get(file.stem, shown / f"{file.stem}.jpg"))
                for number, line in text_lines(file):
                    raw = {"line": line, "id": f"{task}/{file.stem}/{number}", "image": [image]}
                    yield f"{task}/{file.name}:{number}", line if isinstance(line, SampleError) else raw

    def question(self, raw: Any) -> Question:
        """A line is a statement, a tab, and Yes or No."""
        statement, _, gold = raw["line"].strip().partition("\t")
        gold = gold.strip()
        if gold not in {"Yes", "No"}:
            raise SampleError(f"behind the tab stands {gold[:40]!r}, neither Yes nor No")
        pair = raw["id"].rpartition("/")[0]
        task = pair.partition("/")[0]
        return Question(
            id=raw["id"],
            text=self._text(statement.strip()),
            images=raw["image"],
            gold=gold,
            targets=[gold, gold.lower()],
            fields={"category": task, "image": pair},
            options=("Yes", "No"),
            task=task,
            group=pair,
        )

    def unread(self, place: str) -> Mapping[str, Json]:
        """It is one of the two statements about its picture."""
        file = place.rpartition(":")[0]
        return {"category": file.partition("/")[0], "image": file.removesuffix(".txt")}

    def _stored(self, table: Place) -> Iterator[tuple[str, object]]:
        """The rows of the tasks asked; both statements about a picture have its ``question_id``."""
        for place, row in stored_rows(table, ["image"]):
            if row["category"] in self.settings.tasks:
                pair = str(PurePosixPath(str(row["question_id"])).with_suffix(""))
                number = place.rpartition(":")[2]
                line = f"{row['question']}\t{row['answer']}"
                yield f"{pair}:{number}", {"line": line, "id": f"{pair}/{number}", "image": row["image"]}

    def _folder(self, task: str) -> Path:
        found = [folder for place in _PLACES if (folder := self.settings.path / place / task).is_dir()]
        if not found:
            raise InputError(f"{self.settings.path}: there is no folder {task}. {_HOW}")
        return found[0]

    def _text(self, statement: str) -> str:
        if self.settings.prompt == "official":
            return statement
        return statement.replace(_ASKED_FOR, "").strip() + IN_A_WORD

    @classmethod
    def tiny(cls, folder: Path) -> Self:
        """A task of each layout, two pictures in the last, and one of cognition."""
        root = folder / _PLACES[0]
        for task, inside in {"code_reasoning": "", "artwork": "images", "existence": ""}.items():
            asked = root / task / ("questions_answers_YN" if inside else "")
            names = ["1", "2"] if task == "existence" else ["1"]
            draw(root / task / inside, *(f"{name}.png" for name in names))
            asked.mkdir(exist_ok=True)
            for name in names:
                lines = f"Is there a dog? {_ASKED_FOR}\tYes\nIs there a cat?  {_ASKED_FOR}\tNo\n\n"
                (asked / f"{name}.txt").write_text(lines, encoding="utf-8")
        return cls(MMESettings(path=folder, tasks=("code_reasoning", "artwork", "existence")))


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _ENDINGS)
