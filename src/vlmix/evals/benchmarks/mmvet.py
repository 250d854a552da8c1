"""MM-Vet (Yu et al. 2024): open questions that need several skills at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Final, Literal, Self

from vlmix.core.errors import SampleError
from vlmix.core.parts import BENCHMARKS
from vlmix.evals.benchmarks._judged import JudgedBenchmark, JudgedSettings
from vlmix.evals.benchmarks._layout import entries, first_of, json_whole, picture, row_of, text_of
from vlmix.evals.benchmarks._official import Question
from vlmix.evals.benchmarks._stored import stored_rows
from vlmix.evals.benchmarks._tiny import draw, write

_FILE: Final = "mm-vet.json"
_PLACES: Final = (_FILE, f"mm-vet/{_FILE}")
_BEGINNINGS: Final = {
    "llava": "",
    "lmms_eval": "First please perform reasoning, and think step by step to provide best answer to the "
    "following question: \n\n",
}
_HOW: Final = "It is in mm-vet.zip, a release of the repository yuweihao/MM-Vet."


class MMVetSettings(JudgedSettings):
    """The folder with ``mm-vet.json`` and ``images``, or that above it; ``prompt`` says who asks."""

    rule: ClassVar = "mmvet"
    kind: Literal["mmvet"] = "mmvet"  # pyright: ignore[reportIncompatibleVariableOverride]
    prompt: Literal["llava", "lmms_eval"] = "llava"


@BENCHMARKS.register("mmvet")
class MMVet(JudgedBenchmark):
    """``total_percent`` of the questions, beside that by skill and by the set of skills a question needs.

    LLaVA-1.5 asks the bare question (haotian-liu/LLaVA, ``docs/Evaluation.md``); lmms-eval asks for reasoning
    first (EvolvingLMMs-Lab/lmms-eval@2bb5e98 ``tasks/mmvet/mmvet.yaml``).
    """

    settings_class = MMVetSettings
    settings: MMVetSettings
    paper = "MM-Vet: Evaluating Large Multimodal Models for Integrated Capabilities (Yu et al., ICML 2024)"
    headlines: ClassVar = {"gpt4": "total_percent", "elements": "total_percent"}

    def lines(self) -> Iterator[tuple[str, object]]:
        """The questions, in the order of the file."""
        if table := self.settings.table("test", _PLACES):
            for place, row in stored_rows(table, ["image"]):
                skills = str(row.get("capability") or "").split(",")
                yield place, {**row, "id": row.get("question_id"), "capability": skills}
            return
        path = self._file
        yield from entries(path, json_whole(path), "questions")

    def question(self, raw: object) -> Question:
        """The targets are the ways to be right, every part of each; the task is the set of skills."""
        row = row_of(raw)
        skills, shown = row["capability"], row.get("image")
        named = isinstance(skills, list) and all(isinstance(each, str) and each for each in skills)
        if not named or not skills:
            raise SampleError(f"`capability` is {str(skills)[:60]!r}, no list of skills")
        gold, asked = text_of(row, "answer"), text_of(row, "question")
        if not isinstance(shown, list):
            shown = [picture(self._file.parent / "images", row["imagename"])]
        return Question(
            id=text_of(row, "id"),
            text=_BEGINNINGS[self.settings.prompt] + asked,
            images=shown,
            gold=gold,
            targets=[" and ".join(map(str.strip, way.split("<AND>"))) for way in gold.split("<OR>")],
            fields={"question": asked, "capability": list(skills)},
            task="_".join(sorted(skills)),
            group=str(row.get("imagename", "")),
        )

    @property
    def _file(self) -> Path:
        return first_of(self.settings.path, _PLACES, _HOW)

    @classmethod
    def tiny(cls, folder: Path) -> Self:
        """A question with one answer, one with two parts, one with two ways, one with both."""
        asked = [
            ("What is on the plate?", "an apple<AND>a pear", ["rec", "spat"]),
            ("How late is it?", "9:50<OR>ten to ten", ["ocr"]),
            ("What is x?", "-1<AND>-5<OR>minus one<AND>minus five", ["ocr", "math"]),
            ("Which animal is it?", "a cat", ["rec"]),
        ]
        names = [f"v1_{number}" for number in range(len(asked))]
        draw(folder / "images", *(f"{name}.png" for name in names))
        whole = {
            name: {"imagename": f"{name}.png", "question": question, "answer": answer, "capability": skills}
            for name, (question, answer, skills) in zip(names, asked, strict=True)
        }
        write(folder / _FILE, whole)
        return cls(MMVetSettings(path=folder))
