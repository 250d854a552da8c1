"""Which of several annotators' answers a protocol counts as right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

from vlmix.core.sample import Json, Row
from vlmix.core.scoring import Scorer

_ENOUGH: Final = 4
"""Of annotators who say the same: each of them then has three others who agree."""


def best_answers(
    rule: Scorer, protocol: str, golds: Sequence[str], fields: Mapping[str, Json] | None = None
) -> list[str]:
    """The annotators' answers that score highest, the most frequent first.

    They are right altogether where at least four agree in words that the protocol leaves as they are; else
    no answer is.
    """
    counts = Counter(golds).most_common()
    asked = [text for text, count in counts if count >= _ENOUGH] or [text for text, _ in counts]
    rows = [Row(text, list(golds), text, fields or {}) for text in asked]
    values = [each.value or 0.0 for each in rule.judge(rows, protocol)]
    return [text for text, value in zip(asked, values, strict=True) if value == max(values)]
