"""RefCOCO, RefCOCO+ and RefCOCOg: the box of what a phrase means, as text, right if it overlaps by half."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Sequence
from typing import ClassVar, Final

from vlmix.core.errors import InputError
from vlmix.core.parts import SCORERS
from vlmix.core.sample import Judged, Row
from vlmix.core.scoring import Protocol, Scorer, Summary
from vlmix.evals.scoring._fields import whole_of
from vlmix.evals.scoring._tally import UNANSWERED, grouped, mean, texts

Box = tuple[float, float, float, float]

_LMMS: Final = "lmms_eval"
_INTERNVL: Final = "internvl"
_QWEN: Final = "qwen_vl"
_PIXELS: Final = "pixels"
_NOTHING: Final[Box] = (0.0, 0.0, 0.0, 0.0)
_NUMBERS: Final = re.compile(r"\[" + r",".join([r"\s*(-?\d+(?:\.\d+)?)"] * 4) + r"\s*\]")
_ANYTHING: Final = re.compile(r"\[*\[(.*?),(.*?),(.*?),(.*?)\]")
_CORNERS: Final = re.compile(r"\((.*?)\),\((.*?)\)")
_THRESHOLDS: Final = (0.1, 0.3, 0.5, 0.7, 0.9)
_ENOUGH: Final = 0.5


@SCORERS.register("refcoco")
class RefCOCOScorer(Scorer):
    """1 where the boxes' intersection is at least half of their union. ``gold``: x1, y1, x2, y2 in pixels.

    lmms-eval reads the first ``[x1, y1, x2, y2]`` of plain numbers, in shares of the picture's width and
    height; another scale counts as it stands. InternVL takes whatever stands between the first ``[``, three
    commas and ``]``: in thousandths of the picture if the four add up to 4 or more, else in shares, and in
    32-bit numbers. Qwen-VL reads ``(x1,y1),(x2,y2)`` in 999ths, in 32-bit numbers too. ``pixels`` is
    lmms-eval's rule for boxes in the picture's own pixels. An answer that holds no box is the empty one.
    """

    protocols: ClassVar = {
        _LMMS: Protocol(
            "EvolvingLMMs-Lab/lmms-eval@60e0ba9f3c8b14ca83a5ee8490cd2329b127834b "
            "lmms_eval/tasks/refcoco/utils_rec.py"
        ),
        _INTERNVL: Protocol(
            "OpenGVLab/InternVL@0355722a139b2564809e70c2c84407f6664067fc "
            "internvl_chat/eval/refcoco/evaluate_grounding.py"
        ),
        _QWEN: Protocol(
            "QwenLM/Qwen-VL@10cb904198d4e0e161d0f9f36ba9fac8ac7899e4 eval_mm/evaluate_grounding.py"
        ),
        _PIXELS: Protocol("vlmix: lmms_eval's rule for boxes in pixels"),
    }
    fields: ClassVar = {"width": "of the picture, in pixels", "height": "of the picture, in pixels"}
    optional: ClassVar = {"split": "val, testA or testB"}

    def judge(self, rows: Sequence[Row], protocol: str) -> list[Judged]:
        """Each row on its own."""
        return [_judge(row, protocol) for row in rows]

    def summarise(self, rows: Sequence[Row], judged: Sequence[Judged], protocol: str) -> Summary:
        """lmms-eval's figures, or the one that the other scripts print; by split where questions name one."""
        groups = (
            grouped((str(row.fields.get("split", "")), each) for row, each in zip(rows, judged, strict=True))
            if any("split" in row.fields for row in rows)
            else {}
        )
        splits = {name: _figures(some, protocol) for name, some in groups.items()}
        return {**_figures(judged, protocol), **splits}


def _figures(judged: Sequence[Judged], protocol: str) -> dict[str, float]:
    if protocol in {_INTERNVL, _QWEN}:
        return {"Precision @ 1": mean([each.value or 0.0 for each in judged])}
    overlaps = [each.detail.get("IoU", 0.0) for each in judged]
    return {
        "IoU": mean(overlaps),
        **{f"ACC@{least}": mean([float(overlap >= least) for overlap in overlaps]) for least in _THRESHOLDS},
        "Center_ACC": mean([each.detail.get("Center_ACC", 0.0) for each in judged]),
    }


def _judge(row: Row, protocol: str) -> Judged:
    if row.answer is None:
        return UNANSWERED
    gold = _gold(row)
    size = (
        (float(whole_of(row, "width")), float(whole_of(row, "height"))) if protocol != _PIXELS else (1.0, 1.0)
    )
    if protocol in {_INTERNVL, _QWEN}:
        said = _anything(row.answer) if protocol == _INTERNVL else _corners(row.answer)
        box = _on_picture(said or _NOTHING, size, protocol)
        overlap = _overlap_32(box, gold)
        detail = {"IoU": overlap} if math.isfinite(overlap) else {}
    else:
        said = _numbers(row.answer)
        box, gold = said or _NOTHING, _shared(gold, size)
        found = _overlap(gold, box)
        if found is None:
            return Judged(None, _told(box))
        overlap, detail = found, {"IoU": found, "Center_ACC": float(_centred(gold, box))}
    return Judged(float(overlap >= _ENOUGH), _told(box), "read" if said else "unparsed", detail)


def _gold(row: Row) -> Box:
    """The box of the question.

    Raises:
        InputError: if it is not four numbers.

    """
    try:
        x1, y1, x2, y2 = (float(number) for number in texts(row.gold))
    except ValueError:
        raise InputError(f"question {row.id}: `gold` must be [x1, y1, x2, y2], not {row.gold!r}") from None
    return x1, y1, x2, y2


def _told(box: Box) -> str:
    return ", ".join(f"{each:.6g}" for each in box)


def _numbers(answer: str) -> Box | None:
    match = _NUMBERS.search(answer)
    return _box(match.groups()) if match else None


def _anything(answer: str) -> Box | None:
    match = _ANYTHING.search(answer)
    return _box(match.groups()) if match else None


def _corners(answer: str) -> Box | None:
    match = _CORNERS.search(answer)
    corners = [corner.split(",") for corner in match.groups()] if match else []
    return _box([*corners[0], *corners[1]]) if [len(corner) for corner in corners] == [2, 2] else None


def _box(numbers: Sequence[str]) -> Box | None:
    try:
        x1, y1, x2, y2 = (float(number) for number in numbers)
    except ValueError:
        return None
    return x1, y1, x2, y2


def _shared(box: Box, size: tuple[float, float]) -> Box:
    return box[0] / size[0], box[1] / size[1], box[2] / size[0], box[3] / size[1]


def _overlap(one: Box, other: Box) -> float | None:
    """Intersection over union; None where the union is nothing, as with a box turned inside out."""
    wide = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    high = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    union = _area(one) + _area(other) - wide * high
    return wide * high / union if union else None


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _centred(gold: Box, box: Box) -> bool:
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return gold[0] <= x <= gold[2] and gold[1] <= y <= gold[3]


def _single(number: float) -> float:
    """The nearest 32-bit number: what the scripts' tensors hold."""
    try:
        return struct.unpack("f", struct.pack("f", number))[0]
    except OverflowError:
        return math.copysign(math.inf, number)


def _on_picture(box: Box, size: tuple[float, float], protocol: str) -> Box:
    """A box in parts of the picture, in pixels, with 32-bit arithmetic."""
    x1, y1, x2, y2 = (_single(each) for each in box)
    total = _single(_single(_single(x1 + y1) + x2) + y2)
    parts = 999.0 if protocol == _QWEN else 1000.0 if total >= 4 else 1.0
    x1, y1, x2, y2 = (_single(each / parts) for each in (x1, y1, x2, y2))
    wide, high = size
    return _single(x1 * wide), _single(y1 * high), _single(x2 * wide), _single(y2 * high)


def _overlap_32(box: Box, gold: Box) -> float:
    """Intersection over union in 32-bit arithmetic; not a number where the union is nothing."""
    x1, y1, x2, y2 = (_single(each) for each in gold)
    wide = max(0.0, _single(min(box[2], x2) - max(box[0], x1)))
    high = max(0.0, _single(min(box[3], y2) - max(box[1], y1)))
    inside = _single(wide * high)
    both = _single(_area_32(box) + _area_32((x1, y1, x2, y2)))
    union = _single(both - inside)
    return _single(inside / union) if union else math.nan


def _area_32(box: Box) -> float:
    return _single(_single(box[2] - box[0]) * _single(box[3] - box[1]))
