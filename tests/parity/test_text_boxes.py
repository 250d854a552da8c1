"""Boxes as text against torchvision's overlaps of the scripts' 32-bit tensors."""

import random

import pytest
import torch
from torchvision.ops import box_iou

from vlmix.core.parts import SCORERS
from vlmix.core.sample import Row

pytestmark = pytest.mark.parity
SIZES = {"internvl": 1000, "qwen_vl": 999}
FORMS = {"internvl": "a [[{}, {},{} ,{}]] b", "qwen_vl": "<box>({},{}),( {},{})</box>"}


@pytest.mark.parametrize("protocol", SIZES)
def test_overlaps_are_those_of_32_bit_tensors(protocol):
    draw, scorer = random.Random(0), SCORERS.get("refcoco")()
    rows, wanted = [], []
    for number in range(400):
        wide, high = draw.randint(50, 700), draw.randint(50, 700)
        x, y = draw.uniform(0, wide / 2), draw.uniform(0, high / 2)
        gold = [x, y, draw.uniform(x + 9, wide), draw.uniform(y + 9, high)]
        parts = [1, SIZES[protocol]][number % 2] if protocol == "internvl" else SIZES[protocol]
        said = [
            round(edge / side * parts * draw.uniform(0.8, 1.2), 3)
            for edge, side in zip(gold, (wide, high) * 2, strict=True)
        ]
        box = torch.tensor(said)[None]
        scaled = box / (1 if protocol == "internvl" and box.sum() < 4 else SIZES[protocol])
        box = scaled * torch.tensor([wide, high, wide, high])
        wanted.append(box_iou(box, torch.tensor(gold)[None]).item())
        rows.append(Row(str(number), gold, FORMS[protocol].format(*said), {"width": wide, "height": high}))
    found = scorer.judge(rows, protocol)
    assert {each.state for each in found} == {"read"}
    assert [each.detail["IoU"] for each in found] == wanted  # the same bits
    assert [each.value for each in found] == [float(overlap >= 0.5) for overlap in wanted]


@pytest.mark.parametrize(
    ("protocol", "answer", "state", "value"),
    [
        ("lmms_eval", "it is [0.1, 0.2, 0.5, 0.6] or [0,0,1,1]", "read", 1),
        ("lmms_eval", "[.1, .2, .5, .6]", "unparsed", 0),
        ("lmms_eval", "[0.1 0.2 0.5 0.6]", "unparsed", 0),
        ("lmms_eval", "[100, 200, 500, 600]", "read", 0),
        ("pixels", "[10, 20, 50, 60]", "read", 1),
        ("internvl", "[100, 200, 500, 600]", "read", 1),
        ("internvl", "[[.1, .2, .5, .6]]", "read", 1),
        ("internvl", "[a, .2, .5, .6]", "unparsed", 0),
        ("internvl", "[1e99, 2, nan, 4]", "read", 0),
        ("qwen_vl", "(99.9,199.8),(499.5,599.4)", "read", 1),
        ("qwen_vl", "(99.9),(499.5,599.4)", "unparsed", 0),
        ("qwen_vl", "(1,2,3),(4,5)", "unparsed", 0),
    ],
)
def test_each_protocol_reads_its_own_form(protocol, answer, state, value):
    row = Row("1", [10, 20, 50, 60], answer, {"width": 100, "height": 100})
    found = SCORERS.get("refcoco")().judge([row], protocol)[0]
    assert (found.state, found.value) == (state, value)
