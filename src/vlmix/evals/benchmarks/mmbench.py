"""MMBench (Liu et al. 2023), English or Chinese: one of two to four options, in every rotation of them."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, Self

from PIL import Image
from pydantic import field_validator

from vlmix.core.errors import SampleError
from vlmix.core.parts import BENCHMARKS
from vlmix.core.sample import ImageRef, Json, Sample
from vlmix.evals.benchmarks._asking import BY_LETTER, letters_of, listed, with_answers
from vlmix.evals.benchmarks._layout import encoded_picture, first_of, row_of, table_lines, text_of
from vlmix.evals.benchmarks._official import OfficialBenchmark, Question
from vlmix.evals.benchmarks._stored import StoredSettings, stored_rows

_FILES: Final = {
    "en": ("mmbench_dev_20230712.tsv", "mmbench_dev_en_20231003.tsv", "MMBench_DEV_EN.tsv"),
    "cn": ("mmbench_dev_cn_20231003.tsv", "MMBench_DEV_CN.tsv"),
}
_ENDINGS: Final = {"en": BY_LETTER, "cn": "\n请直接回答选项字母。"}
_HOW: Final = "The repository open-compass/MMBench says where the tables are."
_NEEDED: Final = ("index", "question", "A", "B", "answer", "image")
_OTHERS: Final = ("hint", "C", "D", "category", "l2-category", "split")
_LETTERS: Final = "ABCD"
_NOTHING: Final = frozenset({"", "nan", "none"})
_ROTATION: Final = 1_000_000
_POINTER: Final = 64
"""An ``image`` this short is the number of the row that holds it."""


class MMBenchSettings(StoredSettings):
    """The folder with the published tables, pictures inside; the answers of the test split are not public.

    ``file`` names a table that goes by another name. Without ``rotations`` every question is asked once, as
    the published papers' "vanilla" accuracy is; ``hint`` shows what is known besides the picture first.
    """

    rule: ClassVar = "mmbench"
    kind: Literal["mmbench"] = "mmbench"  # pyright: ignore[reportIncompatibleVariableOverride]
    language: Literal["en", "cn"] = "en"
    split: str = "dev"
    file: str = ""
    rotations: bool = True
    hint: bool = True

    @field_validator("split")
    @classmethod
    def _can_be_scored(cls, split: str) -> str:
        return with_answers(split, ["dev"])


@BENCHMARKS.register("mmbench")
class MMBench(OfficialBenchmark):
    """The share of questions that were answered rightly in every rotation of their options.

    The prompts are those of LLaVA-1.5 (haotian-liu/LLaVA@064abb3 llava/eval/model_vqa_mmbench.py with
    ``--single-pred-prompt`` and ``--lang``). A rotation that cannot be used counts as a question of its own.
    """

    settings_class = MMBenchSettings
    settings: MMBenchSettings
    paper = "MMBench: Is Your Multi-modal Model an All-around Player? (Liu et al., ECCV 2024)"
    headlines: ClassVar = {
        "vlmevalkit_circular_exact": "dev.Overall",
        "vlmevalkit_vanilla_exact": "dev.Overall",
        "lmms_eval_static": "overall_acc",
    }

    def lines(self) -> Iterator[tuple[str, object]]:
        """Question by question, each with its rotations, where the table has all first rotations first."""
        settings = self.settings
        names = [settings.file] if settings.file else _FILES[settings.language]
        table = settings.table(settings.split, names, [settings.language, "."])
        rows = stored_rows(table, ["image"]) if table else _rows(first_of(settings.path, names, _HOW))
        questions = dict[object, list[tuple[str, object]]]()
        for place, row in rows:
            index = str(row["index"]) if isinstance(row, dict) else ""
            number = int(index) if index.isdecimal() else -1
            if settings.rotations or number < _ROTATION:
                questions.setdefault(number % _ROTATION if number >= 0 else place, []).append((place, row))
        yield from chain.from_iterable(questions.values())

    def question(self, raw: Any) -> Question:
        """Options end at the first that is empty."""
        raw = {name.lower() if len(name) > 1 else name: value for name, value in raw.items()}
        index, gold = int(text_of(raw, "index")), text_of(raw, "answer")
        options = list[str]()
        for letter in _LETTERS:
            if (text := raw.get(letter) or "").lower() in _NOTHING:
                break
            options.append(text)
        if gold not in letters_of(options):
            raise SampleError(f"`answer` is {gold[:40]!r}, no letter of {len(options)} options")
        if not raw["image"]:
            raise SampleError("there is no picture in `image`, nor in the row that it may name")
        hint = str(raw.get("hint") or "") if self.settings.hint else ""
        first = "" if hint.lower() in _NOTHING else f"{hint}\n"
        kind, wider = (raw.get(name) or None for name in ("category", "l2-category"))
        return Question(
            id=str(index),
            text=f"{first}{text_of(raw, 'question')}{listed(options)}{_ENDINGS[self.settings.language]}",
            images=raw["image"],
            gold=gold,
            targets=[gold, f"({gold})"],
            fields={
                "index": index,
                **dict.fromkeys(_LETTERS),
                **dict(zip(_LETTERS, options, strict=False)),
                "category": kind,
                "l2_category": wider,
                "split": self.settings.split,
            },
            options=letters_of(options),
            task=wider or kind or "",
            group=str(index % _ROTATION),
            language="zh" if self.settings.language == "cn" else "en",
        )

    def unread(self, place: str) -> Mapping[str, Json]:
        """Its number is not known: it is a question of its own, below all numbers."""
        return {
            "index": -int(place.rpartition(":")[2]),
            "A": "",
            "B": "",
            "split": self.settings.split,
        }

    def counts(self, sample: Sample) -> bool:
        """Circular protocols count a question once, whatever the number of its rotations."""
        index = sample.meta["index"]
        return "vanilla" in self.protocol or (isinstance(index, int) and index < _ROTATION)

    @classmethod
    def tiny(cls, folder: Path) -> Self:
        """Three questions in all rotations, in both languages: with a hint, and with two options."""
        questions = (
            ("What follows?", "First it rains.", ["mud", "sun", "fire"], "logic_reasoning"),
            ("What is it?", "", ["a bus", "a dog"], "coarse_perception"),
            ("Which number?", "", ["2", "4", "6", "8"], "coarse_perception"),
        )
        rows = [
            {
                "index": number + turn * _ROTATION,
                "question": question,
                "hint": hint,
                **dict(zip(_LETTERS, options[-turn:] + options[:-turn], strict=False)),
                "answer": _LETTERS[turn],
                "category": f"kind {number % 2}",
                "l2-category": wider,
                "image": str(number) if turn else _encoded(number),
                "split": "dev",
            }
            for number, (question, hint, options, wider) in enumerate(questions, start=1)
            for turn in range(len(options))
        ]
        for name in (_FILES["en"][0], _FILES["cn"][0]):
            with (folder / name).open("w", encoding="utf-8", newline="") as file:
                table = csv.DictWriter(file, [*_NEEDED, *_OTHERS], delimiter="\t")
                table.writeheader()
                table.writerows(sorted(rows, key=lambda row: int(str(row["index"]))))
        return cls(MMBenchSettings(path=folder))


def _rows(path: Path) -> Iterator[tuple[str, object]]:
    """The rows of a table with its pictures; one may stand in another row before, whose number it then is."""
    pictures = dict[str, ImageRef]()
    for place, row in table_lines(path, _NEEDED):
        if isinstance(row, SampleError):
            yield place, row
            continue
        raw = row_of(row)
        image = raw["image"] or ""
        if len(image) > _POINTER:
            pictures[raw["index"]] = encoded_picture(image)
        found = pictures.get(raw["index"] if len(image) > _POINTER else image)
        yield place, {**raw, "image": [found] if found else []}


def _encoded(number: int) -> str:
    held = io.BytesIO()
    Image.new("RGB", (32, 24), (60 * number, 80, 120)).save(held, format="PNG")
    return base64.b64encode(held.getvalue()).decode("ascii")
