"""What caption benchmarks share: one sentence for each picture, scored against people's captions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Final

from vlmix.core.errors import SampleError
from vlmix.data.tables import Place
from vlmix.evals.benchmarks._layout import entries, json_whole, picture, row_of, text_of
from vlmix.evals.benchmarks._official import OfficialBenchmark, Question
from vlmix.evals.benchmarks._stored import StoredSettings, stored_rows

CAPTIONED: Final = (
    ("one.jpg", ["A red bus waits at the station.", "a red bus waits at the station"]),
    ("two.jpg", ["Two dogs run through deep snow", "two dogs run through deep snow."]),
    ("three.jpg", ["People eat pizza in a kitchen.", "people eat pizza in a kitchen"]),
    ("four.jpg", ["Some boats lie on calm water.", "some boats lie on calm water"]),
)
"""Pictures of the tiny sets: the captions of each have the same words, so that one answer can be perfect."""


class CaptionSettings(StoredSettings):
    """``prompt`` is asked of every picture; the usual one is lmms-eval's, which LLaVA-1.5 was taught with."""

    prompt: str = "Provide a one-sentence caption for the provided image."


class CaptionBenchmark(OfficialBenchmark):
    """``lines`` gives objects with ``id``, ``captions`` and ``image``: a path below the settings', or a list.

    The targets are what people wrote. None is right altogether: where people disagree, no caption has the
    highest CIDEr.
    """

    settings: Any
    headlines: ClassVar[Mapping[str, str]] = {"ptb": "CIDEr", "simple": "CIDEr"}

    def question(self, raw: object) -> Question:
        """Each picture stands for itself."""
        row = row_of(raw)
        shown = row["image"]
        captions = [text_of({"caption": caption}, "caption") for caption in row["captions"]]
        if not captions:
            raise SampleError("the picture has no caption")
        return Question(
            id=text_of(row, "id"),
            text=self.settings.prompt,
            images=shown if isinstance(shown, list) else [picture(self.settings.path, shown)],
            gold=captions,
            targets=captions,
            task=str(row.get("domain", "")),
            fields={"domain": str(row["domain"])} if "domain" in row else {},
        )


def stored_lines(table: Place, name: str, captions: str) -> Iterator[tuple[str, object]]:
    """The rows of lmms-lab's table, whose columns ``name`` and ``captions`` are the id and the captions."""
    for place, row in stored_rows(table, ["image"]):
        yield place, {"id": row.get(name), "image": row.get("image"), "captions": row.get(captions)}


def coco_lines(path: Path, folder: str) -> Iterator[tuple[str, object]]:
    """The pictures of a file in COCO's format with their captions; captions of no picture are lines too.

    Raises:
        InputError: if the file holds no pictures and captions.

    """
    whole = json_whole(path)
    held = whole if isinstance(whole, dict) else {}
    captions: dict[object, list[object]] = {}
    broken: list[tuple[str, SampleError]] = []
    for place, raw in entries(path, held.get("annotations"), "annotations"):
        try:
            captions.setdefault(text_of(raw, "image_id"), []).append(text_of(raw, "caption"))
        except SampleError as error:
            broken.append((place, error))
    for place, raw in entries(path, held.get("images"), "images"):
        if isinstance(raw, dict):
            name, own = raw.get("file_name"), captions.pop(str(raw.get("id")), [])
            yield place, {**raw, "image": f"{folder}/{name}" if name else None, "captions": own}
        else:
            yield place, raw
    yield from broken
    for name in captions:
        yield f"{path.name}:{name}", SampleError("its captions are there, the picture is not listed")
