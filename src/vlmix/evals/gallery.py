"""Which answers the report shows with their pictures: wrong and right ones, taken from every task in turn."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

from PIL import Image

from vlmix.core.errors import ImageError
from vlmix.core.sample import Answer, ImageRef, Sample, Score
from vlmix.evals.controls import question_of, targets_of
from vlmix.evals.run import EvalResult

_SIDE = 320  # longest side of a picture on the page, in pixels
_LETTERS = 400  # longest text of one card
_PICTURES = 6  # most pictures of one card


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture as the page holds it: a data URI, or the reason why there is none."""

    uri: str
    pixelated: bool
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Card:
    """One answered question of the gallery."""

    sample_id: str
    task: str
    pictures: Sequence[Picture]
    hidden_pictures: int
    question: str
    answer: str
    expected: str
    error: str
    value: float


def pick_cards(result: EvalResult, most: int) -> tuple[list[Card], list[Card]]:
    """At most ``most`` cards, wrong answers and right ones; half each where there are enough of both."""
    rows = list(zip(result.samples, result.model.answers, result.model.scores, strict=True))
    wrong = _in_turn([row for row in rows if row[2].value < 1])
    right = _in_turn([row for row in rows if row[2].value >= 1])
    wrong = wrong[: max(most // 2, most - len(right))]
    return [_card(*row) for row in wrong], [_card(*row) for row in right[: most - len(wrong)]]


def _in_turn(rows: Sequence[tuple[Sample, Answer, Score]]) -> list[tuple[Sample, Answer, Score]]:
    tasks: dict[str, list[tuple[Sample, Answer, Score]]] = {}
    for row in sorted(rows, key=lambda row: row[0].task):
        tasks.setdefault(row[0].task, []).append(row)
    return [row for row in chain.from_iterable(zip_longest(*tasks.values())) if row is not None]


def _card(sample: Sample, answer: Answer, score: Score) -> Card:
    return Card(
        sample_id=sample.id,
        task=sample.task,
        pictures=[picture_of(image) for image in sample.images[:_PICTURES]],
        hidden_pictures=max(0, len(sample.images) - _PICTURES),
        question=shortened(question_of(sample).turns[-1].text.strip()),
        answer=shortened(answer.text),
        expected=shortened(" or ".join(targets_of(sample))),
        error=shortened(answer.error),
        value=score.value,
    )


def shortened(text: str) -> str:
    """The text, cut where it is longer than a card."""
    return text if len(text) <= _LETTERS else text[:_LETTERS] + "…"


def picture_of(reference: ImageRef) -> Picture:
    """A picture, made small enough for a page, or why it cannot be shown."""
    try:
        image = reference.open()
    except ImageError as error:
        return Picture("", pixelated=False, problem=shortened(str(error)))
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(uri, pixelated=max(image.size) < _SIDE)
