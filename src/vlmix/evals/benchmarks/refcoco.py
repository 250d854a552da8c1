"""RefCOCO and RefCOCO+ (Yu et al. 2016), RefCOCOg (Mao et al. 2016): the box that a phrase means, as text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Final, Literal, Self

from pydantic import field_validator, model_validator

from vlmix.core.errors import ImageError, SampleError
from vlmix.core.parts import BENCHMARKS
from vlmix.core.sample import ImageRef, Json
from vlmix.data.tables import Place
from vlmix.evals.benchmarks._layout import first_of, json_lines, picture, row_of, text_of
from vlmix.evals.benchmarks._official import OfficialBenchmark, Question
from vlmix.evals.benchmarks._stored import StoredSettings, stored_rows
from vlmix.evals.benchmarks._tiny import draw

Box = tuple[float, float, float, float]
Name = Literal["refcoco", "refcoco+", "refcocog"]

_SPLITS: Final[Mapping[str, tuple[str, ...]]] = {
    "refcoco": ("val", "testA", "testB"),
    "refcoco+": ("val", "testA", "testB"),
    "refcocog": ("val", "test"),
}
_SENTENCE: Final = "{sentence}"
_PLEASE: Final = "Please provide the bounding box coordinate of the region this sentence describes: "
_PROMPTS: Final[Mapping[str, str]] = {
    "llava": f"{_PLEASE}{_SENTENCE}.",
    "lmms_eval": "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right "
    "x, bottom-right y). All values are floating point numbers bounded between 0 and 1. "
    f"{_PLEASE}{_SENTENCE}",
    "internvl": f"{_PLEASE}<ref>{_SENTENCE}</ref>",
    "qwen_vl": f"<ref>{_SENTENCE}</ref><box>",
}
_USUAL: Final[Mapping[str, str]] = {"lmms_eval": "llava", "pixels": "llava"}
_PARTS: Final[Mapping[str, float]] = {"internvl": 1000.0, "qwen_vl": 999.0}
_HOW: Final = (
    "The lines with `image`, `sent`, `bbox`, `width` and `height` are those that Qwen-VL publishes for its "
    "evaluation (QwenLM/Qwen-VL, eval_mm/EVALUATION.md) and InternVL reads as well."
)
_PICKLES: Final = " The folder holds refs(*).p, which are pickles: these may run code and are not read."


class RefCOCOSettings(StoredSettings):
    """The folder with ``refcoco_val.jsonl`` and the like, and with COCO's ``train2014``.

    ``splits`` are all that the data set has, if none is named. ``prompt`` says in whose words a box is asked
    for, those of the protocol if empty; ``template`` are other words, with ``{sentence}`` in them. Boxes that
    are ``padded`` mean the picture made square with margins, as LLaVA-1.5 sees it.
    """

    rule: ClassVar = "refcoco"
    kind: Literal["refcoco"] = "refcoco"  # pyright: ignore[reportIncompatibleVariableOverride]
    dataset: Name = "refcoco"
    splits: tuple[str, ...] = ()
    prompt: Literal["", "llava", "lmms_eval", "internvl", "qwen_vl"] = ""
    template: str = ""
    padded: bool = False

    @field_validator("template")
    @classmethod
    def _asks_the_sentence(cls, template: str) -> str:
        if template and _SENTENCE not in template:
            raise ValueError(f"`template` has no {_SENTENCE} in it")
        return template

    @model_validator(mode="after")
    def _has_the_splits(self) -> Self:
        known = _SPLITS[self.dataset]
        if unknown := [split for split in self.splits if split not in known]:
            raise ValueError(f"{self.dataset} has no split {unknown[0]!r}, only {', '.join(known)}")
        return self


@BENCHMARKS.register("refcoco")
class RefCOCO(OfficialBenchmark):
    """The share of boxes that overlap the right one by half, which papers print for each split.

    The usual words are those that LLaVA-1.5 was taught with (``llava_v1_5_mix665k.json``): lmms-eval's rule
    reads its boxes. The other words are those of the scripts themselves: EvolvingLMMs-Lab/lmms-eval@60e0ba9
    ``tasks/refcoco/utils_rec.py``, OpenGVLab/InternVL@0355722
    ``internvl_chat/eval/refcoco/evaluate_grounding.py``, QwenLM/Qwen-VL@10cb904
    ``eval_mm/evaluate_grounding.py``.
    """

    settings_class = RefCOCOSettings
    settings: RefCOCOSettings
    paper = "Modeling Context in Referring Expressions (Yu et al., ECCV 2016)"
    headlines: ClassVar = {
        "lmms_eval": "ACC@0.5",
        "internvl": "Precision @ 1",
        "qwen_vl": "Precision @ 1",
        "pixels": "ACC@0.5",
    }

    def lines(self) -> Iterator[tuple[str, object]]:
        """The phrases of each split, in the order of the settings; lmms-lab's tables have several a row."""
        name, folder = self.settings.dataset, self.settings.path
        how = _HOW + (_PICKLES if any(folder.rglob("refs(*).p")) else "")
        for split in self.settings.splits or _SPLITS[name]:
            names = [f"{above}{name}_{split}.jsonl" for above in ("", f"{name}/", "refcoco/")]
            if table := self.settings.table(split, names):
                yield from _stored(table, split)
                continue
            path = first_of(folder, names, how)
            for place, raw in json_lines(path):
                yield place, {**raw, "split": split, "place": place} if isinstance(raw, dict) else raw

    def question(self, raw: object) -> Question:
        """A phrase with its box in pixels; the lines have no ids, so that their places are these."""
        row = row_of(raw)
        split, sentence = text_of(row, "split"), text_of(row, "sent")
        box, wide, high = _box(row["bbox"]), _side(row, "width"), _side(row, "height")
        shown, name = _shown(row, self.settings.path / "train2014")
        if self.settings.padded:
            side = max(wide, high)
            x, y = (side - wide) / 2, (side - high) / 2
            box, wide, high = (box[0] + x, box[1] + y, box[2] + x, box[3] + y), side, side
        words = self.settings.prompt or _USUAL.get(self.protocol, self.protocol)
        prompt = self.settings.template or _PROMPTS[words]
        return Question(
            id=text_of(row, "place"),
            text=prompt.replace(_SENTENCE, sentence),
            images=shown,
            gold=list(box),
            targets=[_told(box, wide, high, self.protocol)],
            fields={"width": wide, "height": high, "split": split},
            task=split,
            group=name,
        )

    def unread(self, place: str) -> Mapping[str, Json]:
        """Its split is that of its file; a box of no picture, which nothing meets."""
        inside, _, row = place.partition("/")
        split = inside if row else place.partition(".")[0].rpartition("_")[2]
        return {"width": 1, "height": 1, "split": split}

    @classmethod
    def tiny(cls, folder: Path) -> Self:
        """Two pictures with two phrases in every split."""
        draw(folder / "train2014", *(f"COCO_train2014_00000000000{number}.jpg" for number in (1, 2)))
        for split in _SPLITS["refcoco"]:
            rows = [
                {
                    "image": f"data/coco/train2014/COCO_train2014_00000000000{number}.jpg",
                    "sent": f"{side} thing",
                    "bbox": [2.5 + 16 * (side == "right"), 4.0, 12.5 + 16 * (side == "right"), 20.25],
                    "height": 24,
                    "width": 32,
                }
                for number in (1, 2)
                for side in ("left", "right")
            ]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"refcoco_{split}.jsonl").write_text(lines, encoding="utf-8")
        return cls(RefCOCOSettings(path=folder))


def _stored(table: Place, split: str) -> Iterator[tuple[str, object]]:
    """Each phrase of lmms-lab's rows, with the corners of their boxes and the size of their pictures."""
    for place, row in stored_rows(table, ["image"]):
        try:
            x, y, wide, high = row["bbox"]
            size = row["image"][0].size()
            held = {"image": row["image"], "name": str(row["file_name"]), "width": size[0], "height": size[1]}
            held |= {"bbox": [x, y, x + wide, y + high], "split": split}
            phrases = list(row["answer"])
        except (ImageError, KeyError, TypeError, ValueError, IndexError) as error:
            yield f"{split}/{place}", SampleError(f"no box, picture or phrase ({error})")
            continue
        for number, phrase in enumerate(phrases):
            where = f"{split}/{place}/{number}"
            yield where, {**held, "sent": phrase, "place": where}


def _shown(raw: Mapping[str, Any], folder: Path) -> tuple[list[ImageRef], str]:
    """The picture of a line and its name."""
    if isinstance(raw["image"], list):
        return raw["image"], text_of(raw, "name")
    name = PurePosixPath(text_of(raw, "image")).name
    return [picture(folder, name)], name


def _box(raw: Any) -> Box:
    """Four finite numbers, the left upper corner before the right lower one; JSON has no others.

    Raises:
        SampleError: if they are none.

    """
    numbers = isinstance(raw, list) and len(raw) == 4 and all(type(each) in {int, float} for each in raw)
    if not numbers or not (raw[0] < raw[2] and raw[1] < raw[3]):
        raise SampleError(f"`bbox` is {str(raw)[:60]}, not x1, y1, x2, y2 in pixels")
    return float(raw[0]), float(raw[1]), float(raw[2]), float(raw[3])


def _side(raw: Mapping[str, Any], name: str) -> int:
    side = raw[name]
    if not isinstance(side, int) or isinstance(side, bool) or side < 1:
        raise SampleError(f"`{name}` is {str(side)[:40]}, no whole number of pixels")
    return side


def _told(box: Box, wide: int, high: int, protocol: str) -> str:
    """The box as the protocol reads it."""
    if protocol == "pixels":
        return f"[{', '.join(f'{each:g}' for each in box)}]"
    shares = (box[0] / wide, box[1] / high, box[2] / wide, box[3] / high)
    if protocol not in _PARTS:
        return f"[{', '.join(f'{each:.3f}' for each in shares)}]"
    x1, y1, x2, y2 = (round(each * _PARTS[protocol]) for each in shares)
    return f"({x1},{y1}),({x2},{y2})" if protocol == "qwen_vl" else f"[[{x1}, {y1}, {x2}, {y2}]]"
