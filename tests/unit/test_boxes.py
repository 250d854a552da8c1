"""Procedural boxes: the paint is the published paint, statements are exact, and alone they say nothing."""

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlmix.core.errors import RecipeError
from vlmix.core.parts import SOURCES, read_part
from vlmix.core.sample import Sample
from vlmix.data.boxes.balance import Balance, draw_statement
from vlmix.data.boxes.describe import describe
from vlmix.data.boxes.noise import as_typed
from vlmix.data.boxes.paint import GROUND, paint_box, paint_scene, split_boxes
from vlmix.data.boxes.scene import Item, Scene, draw_scene, read_scene
from vlmix.data.sources.boxes import Boxes, BoxesSettings
from vlmix.data.sources.nlvr import Nlvr, NlvrSettings

NLVR = Path(__file__).parents[3] / "shared" / "data" / "nlvr"


def towers(*boxes: str) -> Scene:
    """``towers("yb k", …)``: letters from the base up, k for black."""
    words = {"y": "yellow", "b": "blue", "k": "black"}
    return Scene(
        tuple(
            tuple(Item(40, 80 - 21 * level, 20, "square", words[letter]) for level, letter in enumerate(box))
            for box in boxes
        ),
        towers=True,
    )


def truths(scene: Scene, wanted: Callable[[str], bool], seed: int = 0) -> dict[str, bool]:
    """Every statement like ``wanted`` among many draws, with its truth for ``scene``."""
    rng = Random(seed)
    drawn = (draw_statement(rng, scene.towers) for _ in range(20_000))
    return {s.text.lower(): s.truth(scene) for s in drawn if wanted(s.text.lower())}


def test_statements_mean_what_people_mean() -> None:
    found = truths(towers("ybk", "k", "ykk"), lambda text: text.startswith("there"))
    expected = {
        "there is a tower with a black block at the top": True,
        "there are two towers with a black block at the top": False,
        "there is exactly one tower with a black block at the base": True,
        "there are two yellow blocks as the base of a tower": True,
        "there is a blue block above a yellow block": True,
        "there is a black block above a yellow block": True,
        "there is a tower with a yellow block over a blue block": False,
        "there is a tower with four blocks": False,
        "there is a tower with only one block": True,
        "there are three black blocks": False,
        "there are 3 blue blocks": False,
        "there is no tower with exactly two blocks": True,
    }
    known = {text: found[text] for text in expected if text in found}
    assert len(known) >= 6
    assert known == {text: expected[text] for text in known}


def test_touching_is_distance_zero() -> None:
    corner, floor, near = (
        Item(0, 90, 10, "circle", "blue"),
        Item(40, 70, 30, "square", "black"),
        Item(89, 1, 10, "square", "blue"),
    )
    assert (corner.in_corner(), floor.in_corner(), near.in_corner()) == (True, False, False)
    assert [item.touches("wall") for item in (corner, floor, near)] == [True, True, False]
    assert describe(Scene(((corner, floor), (near,), ()), towers=False)) == (
        "small blue circle left bottom, big black square bottom; small blue square; "
    )


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32), st.booleans())
def test_items_stay_inside_and_apart(seed: int, stacked: bool) -> None:
    scene = draw_scene(Random(seed), stacked)
    for box in scene.boxes:
        assert all(0 <= item.x <= 100 - item.size and 0 <= item.y <= 100 - item.size for item in box)
        painted = (paint_box(box) != GROUND).any(-1).sum()
        assert painted == sum((paint_box((item,)) != GROUND).any(-1).sum() for item in box)


def test_paint_is_the_published_paint() -> None:
    if not (NLVR / "nlvr_dev.tar").exists():
        pytest.skip("needs shared/data/nlvr/nlvr_dev.tar")
    source = Nlvr(NlvrSettings(path=NLVR / "nlvr_dev.tar", split="dev", permutations=1, boxes=False))
    for index in range(0, len(source), 97):
        record = json.loads(source._published.lines[source.line(index) - 1])
        scene = read_scene(record["structured_rep"])
        theirs = np.asarray(source[index].images[0].open()).astype(int)
        ours = paint_scene(scene).astype(int)
        assert np.abs(theirs - ours).max() <= 40  # the softened edges are rounded in another way
        assert [
            np.array_equal(a, paint_box(b))
            for a, b in zip(split_boxes(paint_scene(scene)), scene.boxes, strict=True)
        ] == [True] * 3


@pytest.mark.slow
def test_a_sentence_alone_says_nothing() -> None:
    """A reader of words alone, taught by one half of the statements, is at chance on the other half."""
    rng, balance, said = Random(5), Balance(), list[tuple[set[str], bool]]()
    for number in range(400):
        scene = draw_scene(rng, towers=number % 2 == 0)
        for _ in range(6):
            text, truth = balance.draw(rng, scene)
            said.append((set(text.lower().split()), truth))
    assert abs(np.mean([truth for _, truth in said]) - 0.5) < 0.05
    taught, asked = said[:1200], said[1200:]
    counts = defaultdict[str, list[float]](lambda: [1.0, 1.0])
    for words, truth in taught:
        for word in words:
            counts[word][truth] += 1
    odds = {word: np.log(true / false) for word, (false, true) in counts.items()}
    hits = [(sum(odds.get(word, 0) for word in words) > 0) == truth for words, truth in asked]
    assert abs(np.mean(hits) - 0.5) < 0.06  # four standard errors


def test_rows_are_functions_of_seed_and_index() -> None:
    wanted = BoxesSettings(size=40, turns=3, counts=0.3, describe=0.3)

    def content(sample: Sample) -> object:
        return (
            sample.id,
            [(turn.role, turn.text) for turn in sample.turns],
            [i.open().tobytes() for i in sample.images],
        )

    forward, backward = Boxes(wanted), Boxes(wanted)
    assert [content(forward[i]) for i in range(40)] == [content(backward[i]) for i in reversed(range(40))][
        ::-1
    ]
    other = Boxes(wanted.model_copy(update={"seed": 1}))
    assert content(other[0])[1:] != content(forward[0])[1:]
    kinds = {sample.turns[-1].text for sample in forward}
    assert {"true", "false"} < kinds
    assert all(len(sample.images) == 3 and sample.turns[0].images for sample in forward)
    assert len(Boxes(wanted.model_copy(update={"boxes": False}))[0].images) == 1
    with pytest.raises(IndexError, match="row 40"):
        forward[40]


def test_a_box_alone_is_counted_judged_and_described() -> None:
    alone = Boxes(BoxesSettings(size=20, turns=3, counts=0.5, each=1.0, describe=1.0, alone=1.0))
    answers = set[str]()
    for sample in alone:
        assert len(sample.images) == 1
        *said, description = (turn.text for turn in sample.turns if turn.role == "assistant")
        assert all(answer.isdigit() or answer in {"true", "false"} for answer in said)
        answers.update(said)
        assert description
        assert ";" not in description  # which parts boxes
    assert {"true", "false", "0", "1"} < answers


def test_counts_box_by_box_add_up_to_the_count_of_all() -> None:
    settings = BoxesSettings(size=40, turns=4, counts=1.0, describe=0.0)
    together, apart = (Boxes(settings.model_copy(update={"each": share})) for share in (0.0, 1.0))
    for whole, parts in zip(together, apart, strict=True):
        for said, answered in zip(whole.turns, parts.turns, strict=True):
            if said.role == "user":
                assert f"Box by box: {said.text}" == answered.text
            else:
                numbers = [int(number) for number in answered.text.split()]
                assert (len(numbers), sum(numbers)) == (3, int(said.text))


def test_settings_are_strict() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'towers'"):
        read_part(SOURCES, {"kind": "boxes", "tower": 0.5})


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32))
def test_typing_keeps_the_sentence_readable(seed: int) -> None:
    rng, text = Random(seed), "At least one tower has a blue block"
    typed = as_typed(rng, text, typo=1.0)
    assert abs(len(typed) - len(text)) <= 2
    assert as_typed(Random(seed), text, 0.0).lower().rstrip(".") in (text.lower(), text.lower()[1:])
