"""COCO captions (Chen et al. 2015): a sentence for each picture of Karpathy's test set, or of COCO's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Final, Literal, Self

from pydantic import field_validator

from vlmix.core.parts import BENCHMARKS
from vlmix.evals.benchmarks._asking import with_answers
from vlmix.evals.benchmarks._captions import (
    CAPTIONED,
    CaptionBenchmark,
    CaptionSettings,
    coco_lines,
    stored_lines,
)
from vlmix.evals.benchmarks._layout import first_of, json_entries, json_lines
from vlmix.evals.benchmarks._tiny import draw, write

_KARPATHY: Final = "dataset_coco.json"
_HOW_KARPATHY: Final = (
    "The first is in caption_datasets.zip of Karpathy and Fei-Fei's deepimagesent, the second is what BLIP "
    "and LAVIS fetch (salesforce/LAVIS)."
)
_HOW_COCO: Final = "It is in the annotations_trainval archives of cocodataset.org."


class CocoCaptionSettings(CaptionSettings):
    """The folder with the captions, and with COCO's ``val2014`` (or ``val2017``).

    lmms-eval asks Karpathy's set with ``prompt`` "Describe the image briefly."
    """

    rule: ClassVar = "coco_caption"
    kind: Literal["coco_caption"] = "coco_caption"  # pyright: ignore[reportIncompatibleVariableOverride]
    split: str = "karpathy_test"

    @field_validator("split")
    @classmethod
    def _can_be_scored(cls, split: str) -> str:
        return with_answers(split, ("karpathy_test", "karpathy_val", "val2014", "val2017"))


@BENCHMARKS.register("coco_caption")
class CocoCaption(CaptionBenchmark):
    """``CIDEr`` over the 5 000 pictures of Karpathy's test set, of which papers print 100 times that.

    The prompt is lmms-eval's for COCO (EvolvingLMMs-Lab/lmms-eval@03b2f7c ``tasks/coco_cap/utils.py``).
    """

    settings_class = CocoCaptionSettings
    settings: CocoCaptionSettings
    paper = "Microsoft COCO Captions: Data Collection and Evaluation Server (Chen et al., 2015)"

    def lines(self) -> Iterator[tuple[str, object]]:
        """The pictures of the split, in the order of its file."""
        folder, split = self.settings.path, self.settings.split
        if not split.startswith("karpathy"):
            names = [f"annotations/captions_{split}.json", f"captions_{split}.json"]
            if table := self.settings.table("val", names):
                yield from stored_lines(table, "question_id", "answer")
            else:
                yield from coco_lines(first_of(folder, names, _HOW_COCO), split)
            return
        path = first_of(folder, [_KARPATHY, f"coco_{split}.json"], _HOW_KARPATHY)
        if path.name == _KARPATHY:
            yield from _karpathy(path, split.removeprefix("karpathy_"))
            return
        for place, raw in json_lines(path):
            if isinstance(raw, dict) and isinstance(raw.get("image"), str):
                yield place, {"id": Path(raw["image"]).stem, "captions": raw.get("caption"), **raw}
            else:
                yield place, raw

    @classmethod
    def tiny(cls, folder: Path) -> Self:
        """Four pictures to ask, and one of the training set."""
        draw(folder / "val2014", *(name for name, _ in CAPTIONED))
        images = [
            {
                "filepath": "val2014",
                "filename": name,
                "cocoid": number,
                "split": "test" if captions else "train",
                "sentences": [{"raw": caption} for caption in captions],
            }
            for number, (name, captions) in enumerate([*CAPTIONED, ("five.jpg", [])])
        ]
        write(folder / _KARPATHY, {"images": images, "dataset": "coco"})
        return cls(CocoCaptionSettings(path=folder))


def _karpathy(path: Path, split: str) -> Iterator[tuple[str, object]]:
    """The pictures of a split; one that does not say of which it is may be of this one."""
    for place, raw in json_entries(path, "images"):
        if not isinstance(raw, dict) or not isinstance(raw.get("split"), str):
            yield place, raw
        elif raw["split"] == split:
            yield place, {"id": raw.get("cocoid"), "image": _image(raw), "captions": _sentences(raw)}


def _image(raw: dict[str, object]) -> str:
    return f"{raw.get('filepath')}/{raw.get('filename')}"


def _sentences(raw: dict[str, object]) -> list[object]:
    held = raw.get("sentences")
    return (
        [each.get("raw") if isinstance(each, dict) else None for each in held]
        if isinstance(held, list)
        else []
    )
