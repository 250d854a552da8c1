"""AI2D (Kembhavi et al. 2016): multiple choice on diagrams of school science."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, Self

from vlmix.core.errors import InputError, SampleError
from vlmix.core.parts import BENCHMARKS
from vlmix.core.sample import ImageRef
from vlmix.evals.benchmarks._asking import BY_LETTER, letters_of, listed, texts_in
from vlmix.evals.benchmarks._layout import first_of, json_whole, picture, row_of, text_lines, text_of
from vlmix.evals.benchmarks._lettered import Box, LetteredPicture
from vlmix.evals.benchmarks._official import OfficialBenchmark, Question
from vlmix.evals.benchmarks._stored import StoredSettings, stored_rows
from vlmix.evals.benchmarks._tiny import draw, write

_HOW: Final = "prior.allenai.org/projects/diagram-understanding has ai2d-all.zip and the list of test ids."
_TEST_IDS: Final = "ai2d_test_ids.csv"

_TINY: Final = {
    "7.png": {
        "What does the arrow point at?": (False, ["stem", "leaf", "root", "seed"], 1),
        "Which letter is the root?": (True, ["A", "B", "C", "D"], 0),
    },
    "12.png": {
        "How many stages are there?": (False, ["2", "3", "4", "5"], 3),
        "Which label is the larva?": (True, ["A", "B", "C", "D"], 1),
    },
    "30.png": {"Who is in no test?": (False, ["fish", "frog", "duck", "crab"], 2)},
}


class AI2DSettings(StoredSettings):
    """The folder ``ai2d``, or the one around it, with ``ai2d_test_ids.csv``; or the table of lmms-lab.

    Some questions ask for the letters that replaced the words of a diagram. ``letters`` are drawn into the
    pictures of these questions, unless a folder ``abc_images`` has such pictures, or left out. A table has
    its pictures ready. ``suffix`` ends every question.
    """

    rule: ClassVar = "ai2d"
    kind: Literal["ai2d"] = "ai2d"  # pyright: ignore[reportIncompatibleVariableOverride]
    letters: Literal["drawn", "none"] = "drawn"
    suffix: str = BY_LETTER


@BENCHMARKS.register("ai2d")
class AI2D(OfficialBenchmark):
    """Accuracy on the diagrams kept for testing.

    The prompt is lmms-eval's (EvolvingLMMs-Lab/lmms-eval@0312cf2 lmms_eval/tasks/ai2d/ai2d.yaml, utils.py),
    which ends as LLaVA-1.5 asks for an option's letter. The letters' type is ours: the data set has only
    their places.
    """

    settings_class = AI2DSettings
    settings: AI2DSettings
    paper = "A Diagram Is Worth a Dozen Images (Kembhavi et al., ECCV 2016)"
    headlines: ClassVar = {
        "lmms_eval": "exact_match",
        "vlmevalkit_exact": "accuracy",
        "llava_letter": "accuracy",
    }

    def lines(self) -> Iterator[tuple[str, object]]:
        """The questions by diagram, in the order of their numbers; those of a table by row."""
        if table := self.settings.table("test", ["ai2d", "questions"]):
            for number, (place, row) in enumerate(stored_rows(table, ["image"])):
                yield place, {**row, "id": str(number), "correct": row.get("answer")}
            return
        folder = first_of(self._root, ["questions"], _HOW)
        for file in sorted(folder.glob("*.json"), key=lambda each: (len(each.name), each.name)):
            if file.name.partition(".")[0] in self._tested:
                yield from self._asked(file)

    def question(self, raw: object) -> Question:
        """Every option with its letter, one to a line."""
        row = row_of(raw)
        options, correct = texts_in(row["options"]), int(text_of(row, "correct"))
        letters = letters_of(options)
        if correct not in range(len(letters)):
            raise SampleError(f"no option has the number {correct}, which is said to be right")
        return Question(
            id=text_of(row, "id"),
            text=text_of(row, "question") + listed(options) + self.settings.suffix,
            images=row["image"] if isinstance(row["image"], list) else [self._picture(row)],
            gold=correct,
            targets=[letters[correct]],
            fields={"options": options},
            options=letters,
            group=str(row.get("group", "")),
        )

    @property
    def _root(self) -> Path:
        inside = self.settings.path / "ai2d"
        return inside if inside.is_dir() else self.settings.path

    @cached_property
    def _tested(self) -> frozenset[str]:
        root = self._root if (self._root / _TEST_IDS).is_file() else self.settings.path
        lines = [str(line).strip() for _, line in text_lines(first_of(root, [_TEST_IDS], _HOW))]
        return frozenset(lines)

    def _asked(self, file: Path) -> Iterator[tuple[str, object]]:
        """The questions about one diagram."""
        try:
            found = row_of(json_whole(file))
            name, asked = text_of(found, "imageName"), row_of(found.get("questions"))
        except InputError as error:
            yield file.name, SampleError(str(error))
            return
        for number, (text, raw) in enumerate(asked.items()):
            yield f"{file.name}:{number}", _plain(text, name, raw)

    def _picture(self, row: dict[str, Any]) -> ImageRef:
        name = text_of(row, "image")
        shown = picture(self._root / "images", name)
        if not row["lettered"] or self.settings.letters == "none":
            return shown
        if (self._root / "abc_images").is_dir():
            return picture(self._root / "abc_images", name)
        return ImageRef(LetteredPicture(self._root / "images" / name, self._boxes(name)))

    def _boxes(self, name: str) -> tuple[Box, ...]:
        try:
            found = row_of(json_whole(self._root / "annotations" / f"{name}.json"))
        except InputError as error:
            raise SampleError(f"its letters cannot be drawn: {error}") from None
        return tuple(_box(each) for each in found["text"].values())

    @classmethod
    def tiny(cls, folder: Path) -> Self:
        """Two diagrams of the test and one that is not, questions about words and about letters."""
        draw(folder / "images", *_TINY)
        for image, asked in _TINY.items():
            questions = {
                text: {
                    "abcLabel": lettered,
                    "answerTexts": options,
                    "correctAnswer": correct,
                    "questionId": f"{image}-{number}",
                }
                for number, (text, (lettered, options, correct)) in enumerate(asked.items())
            }
            write(folder / "questions" / f"{image}.json", {"imageName": image, "questions": questions})
            word = {"rectangle": [[4, 4], [14, 16]], "value": "root", "replacementText": "A"}
            write(folder / "annotations" / f"{image}.json", {"text": {"T0": word}})
        (folder / _TEST_IDS).write_text("7\n12\n", encoding="utf-8")
        return cls(AI2DSettings(path=folder))


def _plain(text: str, image: str, raw: object) -> object:
    """A question of the published file with the names that a table has."""
    if not isinstance(raw, dict):
        return SampleError("the question is no object of named fields")
    return {
        "id": raw.get("questionId"),
        "question": text,
        "options": raw.get("answerTexts"),
        "correct": raw.get("correctAnswer"),
        "lettered": raw.get("abcLabel"),
        "image": image,
        "group": image,
    }


def _box(each: Any) -> Box:
    (left, top), (right, bottom) = each["rectangle"]
    return Box(
        min(left, right), min(top, bottom), max(left, right), max(top, bottom), each["replacementText"]
    )
