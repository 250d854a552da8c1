"""SEED-Bench (Li et al. 2023): one of four options about a picture, in nine kinds of question."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, Self

from PIL import Image

from vlmix.core.errors import SampleError
from vlmix.core.parts import BENCHMARKS
from vlmix.core.sample import Json
from vlmix.evals.benchmarks._asking import BY_LETTER, letters_of, listed
from vlmix.evals.benchmarks._layout import first_of, json_entries, picture, text_of
from vlmix.evals.benchmarks._official import OfficialBenchmark, Question
from vlmix.evals.benchmarks._stored import StoredSettings, stored_rows
from vlmix.evals.benchmarks._tiny import write

_FILE: Final = "SEED-Bench.json"
_PICTURES: Final = "SEED-Bench-image"
_HOW: Final = "It and SEED-Bench-image.zip are those of AILab-CVC/SEED-Bench on Hugging Face."
_COLUMNS: Final = ("choice_a", "choice_b", "choice_c", "choice_d")
_KINDS: Final = {
    "1": "Scene Understanding",
    "2": "Instance Identity",
    "3": "Instance Attributes",
    "4": "Instance Location",
    "5": "Instances Counting",
    "6": "Spatial Relation",
    "7": "Instance Interaction",
    "8": "Visual Reasoning",
    "9": "Text Understanding",
}
"""As `question_type` of the file names them."""

_TINY: Final = (
    ("1_1", "image", 1, "Where is this?", "A"),
    ("1_1", "image", 5, "How many cups are there?", "B"),
    ("2_2", "image", 5, "How many towels are there?", "C"),
    ("clip.mp4", "video", 10, "What is being done?", "A"),
    ("3_3", "image", 1, "What is the weather?", "D"),
)


class SeedBenchSettings(StoredSettings):
    """The folder with ``SEED-Bench.json`` and ``SEED-Bench-image``; ``suffix`` ends every question."""

    rule: ClassVar = "seedbench_image"
    kind: Literal["seedbench_image"] = "seedbench_image"  # pyright: ignore[reportIncompatibleVariableOverride]
    suffix: str = BY_LETTER


@BENCHMARKS.register("seedbench_image")
class SeedBenchImage(OfficialBenchmark):
    """The accuracy over the questions about pictures, SEED-I in papers; those about videos are not asked.

    The prompt is that of LLaVA-1.5 (haotian-liu/LLaVA@05f156c docs/Evaluation.md); lmms-eval's is the same
    (EvolvingLMMs-Lab/lmms-eval@07725bd lmms_eval/tasks/seedbench/utils.py).
    """

    settings_class = SeedBenchSettings
    settings: SeedBenchSettings
    paper = "SEED-Bench: Benchmarking Multimodal LLMs with Generative Comprehension (Li et al., CVPR 2024)"
    headlines: ClassVar = {
        "llava_convert_seed": "image_percent",
        "lmms_eval": "seed_image",
        "lmms_eval_eagle_fork": "seed_image",
    }

    def lines(self) -> Iterator[tuple[str, object]]:
        """The questions that are not about videos."""
        table = self.settings.table("test", [_FILE])
        for place, raw in stored_rows(table, ["image"]) if table else self._rows():
            if not isinstance(raw, dict) or raw.get("data_type") != "video":
                yield place, raw

    def _rows(self) -> Iterator[tuple[str, object]]:
        return json_entries(first_of(self.settings.path, [_FILE], _HOW), "questions")

    def question(self, raw: Any) -> Question:
        """Several questions share a picture, whose name has no ending."""
        gold, name = text_of(raw, "answer"), text_of(raw, "data_id")
        options = [text_of(raw, column) for column in _COLUMNS]
        if gold not in letters_of(options):
            raise SampleError(f"`answer` is {gold[:40]!r}, no letter from A to D")
        number = text_of(raw, "question_type_id")
        return Question(
            id=text_of(raw, "question_id"),
            text=f"{text_of(raw, 'question')}{listed(options)}{self.settings.suffix}",
            images=raw.get("image") or [picture(self.settings.path / _PICTURES, name)],
            gold=gold,
            targets=[gold],
            fields={"data_type": "image", "question_type_id": number},
            options=letters_of(options),
            task=_KINDS.get(number, number),
            group=name,
        )

    def unread(self, place: str) -> Mapping[str, Json]:
        """Counted among those about pictures."""
        del place
        return {"data_type": "image"}

    @classmethod
    def tiny(cls, folder: Path) -> Self:
        """Four questions of two kinds about three pictures, and one about a video."""
        (folder / _PICTURES).mkdir(parents=True, exist_ok=True)
        for number in (1, 2, 3):
            picture = Image.new("RGB", (32, 24), (60 * number, 80, 120))
            picture.save(folder / _PICTURES / f"{number}_{number}", format="PNG")
        questions = [
            {
                "question_id": str(100 + number),
                "question": question,
                "data_id": name,
                "data_type": kind,
                "question_type_id": type_id,
                "answer": answer,
                **{column: f"{column[-1]} thing {number}" for column in _COLUMNS},
            }
            for number, (name, kind, type_id, question, answer) in enumerate(_TINY)
        ]
        kinds = {name: int(number) for number, name in _KINDS.items()}
        write(folder / _FILE, {"questions": questions, "question_type": kinds})
        return cls(SeedBenchSettings(path=folder))
