"""TextCaps (Sidorov et al. 2020): a sentence for each picture that reads the text in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, Self

from pydantic import field_validator

from vlmix.core.errors import SampleError
from vlmix.core.parts import BENCHMARKS
from vlmix.evals.benchmarks._asking import with_answers
from vlmix.evals.benchmarks._captions import CAPTIONED, CaptionBenchmark, CaptionSettings, stored_lines
from vlmix.evals.benchmarks._layout import first_of, json_entries, text_of
from vlmix.evals.benchmarks._tiny import draw, write

_HOW: Final = "It is had from textvqa.org/textcaps, as are the pictures, which are those of TextVQA."


class TextCapsSettings(CaptionSettings):
    """The folder with ``TextCaps_0.1_val.json`` and TextVQA's ``train_images``."""

    rule: ClassVar = "textcaps"
    kind: Literal["textcaps"] = "textcaps"  # pyright: ignore[reportIncompatibleVariableOverride]
    split: str = "val"

    @field_validator("split")
    @classmethod
    def _can_be_scored(cls, split: str) -> str:
        return with_answers(split, ("val", "train"))


@BENCHMARKS.register("textcaps")
class TextCaps(CaptionBenchmark):
    """``CIDEr`` over the 3 166 pictures of the validation set; papers print 100 times that.

    The prompt is lmms-eval's (EvolvingLMMs-Lab/lmms-eval@1ba8ee1 ``tasks/textcaps/utils.py``).
    """

    settings_class = TextCapsSettings
    settings: TextCapsSettings
    paper = "TextCaps: a Dataset for Image Captioning with Reading Comprehension (Sidorov et al., ECCV 2020)"

    def lines(self) -> Iterator[tuple[str, object]]:
        """Each picture with all its captions, of which the file has one a line, in the order they appear."""
        split = self.settings.split
        if table := self.settings.table(split, [f"TextCaps_0.1_{split}.json"]):
            yield from stored_lines(table, "image_id", "caption_str")
            return
        path = first_of(self.settings.path, [f"TextCaps_0.1_{split}.json"], _HOW)
        found: dict[str, dict[str, Any]] = {}
        for place, raw in json_entries(path, "data"):
            try:
                name, caption = text_of(raw, "image_id"), text_of(raw, "caption_str")
            except SampleError as error:
                yield place, error
                continue
            new = {"id": name, "image": f"train_images/{name}.jpg", "captions": []}
            found.setdefault(name, new)["captions"].append(caption)
        for name, picture in found.items():
            yield f"{path.name}:{name}", picture

    @classmethod
    def tiny(cls, folder: Path) -> Self:
        """Four pictures, the captions of which do not stand side by side."""
        draw(folder / "train_images", *(name for name, _ in CAPTIONED))
        rows = [
            {"image_id": Path(name).stem, "caption_str": captions[place], "caption_id": 10 * number + place}
            for place in (0, 1)
            for number, (name, captions) in enumerate(CAPTIONED)
        ]
        whole = {"dataset_type": "val", "dataset_name": "textcaps", "data": rows}
        write(folder / "TextCaps_0.1_val.json", whole)
        return cls(TextCapsSettings(path=folder))
