"""The world of ``continual_claims``: noisy cells, questions about them, and the model that learns."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from PIL import Image

from vlmix.core.interfaces import Source
from vlmix.core.parts import SOURCES
from vlmix.core.sample import ImageRef, Sample, Turn
from vlmix.core.settings import PartSettings, read_settings
from vlmix.data.facts import COLOURS, NUMBERS, SHAPES
from vlmix.train.recipe import Recipe

FACTS, CELL, ROWS, ASKED, BATCH = 160, 8, 2000, 400, 32
KINDS: Final = ("colour", "shape", "count", "place")
_INKS = ((220, 30, 40), (30, 150, 50), (40, 70, 230), (230, 190, 10), (150, 50, 190), (20, 190, 205))
PAINT: Final = dict(zip(COLOURS, (*_INKS, (20, 20, 20), (240, 120, 20)), strict=True))
WHERE: Final = ("corner", "north", "corner", "west", "centre", "east", "corner", "south", "corner")
QUESTIONS: Final = {
    "colour": "Which colour?",
    "shape": "Which shape?",
    "count": "How many?",
    "place": "Where?",
    "caption": "Describe.",
}


METHODS: Final[Mapping[str, dict[str, Any]]] = {
    "naive": {},
    "lora": {"alpha": 8.0},
    "soft_targets": {},
    "msgm": {"lora": {"alpha": 8.0}},
    "rehearsal": {},
    "msgm_rehearsal": {"lora": {"alpha": 8.0}},
    "ewc": {"weight": 100.0, "samples": 128, "language": {"samples": 256, "tokens": 8}},
    "lwf": {},
    "replay_buffer": {"size": 100, "ratio": 0.05},
}
PAST_ONLY: Final = ("rehearsal", "msgm_rehearsal", "replay_buffer")
RATES: Final = (5e-4, 1e-3, 2e-3)
AIM: Final = 80.0
# Student's t at 97.5 % by degrees of freedom: seeds are few.
STUDENT: Final = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 9: 2.262, 11: 2.201}
Setting = Literal["one_shot", "sequence"]
TASKS: Final[Mapping[str, tuple[tuple[str, ...], ...]]] = {
    "one_shot": (KINDS,),
    "sequence": tuple((kind,) for kind in KINDS),
}


class CellsSettings(PartSettings):
    """Pictures of 3 x 3 cells with noise of so many grey levels, and what is asked of them."""

    kind: Literal["cells"] = "cells"
    tasks: tuple[str, ...] = KINDS
    size: int = ROWS
    seed: int = 0
    noise: int = 150


@SOURCES.register("cells")
class Cells(Source):
    """One shape in one colour in one cell, or in as many as are counted; painted once and kept."""

    settings_class = CellsSettings
    settings: CellsSettings

    def __init__(self, settings: CellsSettings) -> None:
        super().__init__(settings)
        self._kept: dict[int, Sample] = {}

    def __len__(self) -> int:
        return self.settings.size

    def __getitem__(self, index: int) -> Sample:
        if index not in self._kept:
            self._kept[index] = self._paint(index)
        return self._kept[index]

    def _paint(self, index: int) -> Sample:
        settings = self.settings
        random, task = (
            np.random.default_rng([settings.seed, index]),
            settings.tasks[index % len(settings.tasks)],
        )
        colour, shape, cell = (int(random.integers(n)) for n in (len(COLOURS), len(SHAPES), len(WHERE)))
        count = int(random.integers(1, 1 + len(NUMBERS)))
        cells = random.permutation(len(WHERE))[:count].tolist() if task == "count" else [cell]
        pixels = np.full((3 * CELL, 3 * CELL, 3), 235, np.int16)
        for place in cells:
            top, left = CELL * (place // 3), CELL * (place % 3)
            pixels[top : top + CELL, left : left + CELL][MASKS[shape]] = PAINT[COLOURS[colour]]
        pixels += random.integers(-settings.noise, settings.noise + 1, pixels.shape, np.int16)
        words = {"colour": COLOURS[colour], "shape": SHAPES[shape], "place": WHERE[cell]}
        words["count"] = NUMBERS[count - 1]
        words["caption"] = f"{words['colour']} {words['shape']} {words['place']}"
        picture = ImageRef(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
        turns = (Turn("user", (picture, QUESTIONS[task])), Turn("assistant", (words[task],)))
        return Sample(f"cells-{settings.seed}-{index}", turns, words[task], task)

    @classmethod
    def tiny(cls, folder: Path) -> CellsSettings:
        """A few pictures."""
        del folder
        return CellsSettings(size=8)


MASKS: Final = [
    np.random.default_rng([99, number]).random((CELL, CELL)) < 0.5 for number in range(len(SHAPES))
]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Optimizer steps of each part; ``one_shot`` for all questions, ``task`` for one type in the sequence."""

    language: int = 300
    align: int = 300
    one_shot: int = 200
    task: int = 80
    noise: int = 150


def recipe(seed: int, sizes: Sizes) -> Recipe:
    """Model, and the stages before the first question."""

    def stage(name: str, train: dict[str, float], source: dict[str, Any], steps: int, **more: Any) -> Any:
        data = [{"source": source}]
        return {"name": name, "train": train, "data": data, "batch_size": BATCH, "steps": steps, **more}

    tower = {"kind": "clip", "image_size": 3 * CELL, "patch_size": CELL, "width": 96, "layers": 1, "heads": 4}
    decoder = {"model_type": "llama", "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    decoder |= {"num_key_value_heads": 4, "intermediate_size": 192, "max_position_embeddings": 128}
    facts = {"kind": "facts", "size": FACTS, "seed": seed}
    captions = {"kind": "cells", "tasks": ["caption"], "seed": seed + 1000, "noise": sizes.noise}
    mix = {"kind": "cells", "seed": seed + 2000, "noise": sizes.noise}
    raw = {
        "name": "continual_claims",
        "seed": seed,
        "model": {
            "image_size": 3 * CELL,
            "encoders": [tower | {"mlp": 192, "feature_layer": 1, "activation": "gelu"}],
            "fusion": {"kind": "single"},
            "projector": {"kind": "mlp"},
            "language_model": decoder | {"tie_word_embeddings": True, "initializer_range": 0.08},
            "tokenizer": {"train": {"vocab_size": 420, "samples": 800}},
            "chat_template": "mistral",
            "max_length": 96,
        },
        "stages": [
            stage("language", {"language_model.*": 2e-3}, facts, sizes.language, chat_template="plain"),
            stage("align", {"projector.*": 3e-3}, captions, sizes.align),
            stage("questions", {"projector.*": 1e-3, "language_model.*": 1e-3}, mix, sizes.one_shot),
        ],
    }
    return read_settings(Recipe, raw)


def over_seeds(values: Sequence[float]) -> dict[str, float]:
    """The mean over seeds with Student's 95 % interval."""
    middle = statistics.mean(values)
    half = (
        statistics.stdev(values) * len(values) ** -0.5 * STUDENT[len(values) - 1] if len(values) > 1 else 0.0
    )
    return {"value": middle, "low": middle - half, "high": middle + half}
