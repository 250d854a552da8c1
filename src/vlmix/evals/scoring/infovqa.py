"""InfographicVQA: answers to questions about posters, by edit distance (ANLS), also by kind of question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final

from vlmix.core.parts import SCORERS
from vlmix.core.sample import Json, Judged, Row
from vlmix.core.scoring import Summary
from vlmix.evals.scoring._anls import AnlsScorer
from vlmix.evals.scoring._tally import grouped, mean, texts

_KINDS: Final = {
    "answer_type": "answer_types",
    "evidence": "evidence_types",
    "operation/reasoning": "operation_types",
}
_NAMES: Final = {
    "image span": "Image-Span",
    "question span": "Question-Span",
    "multiple spans": "Multi-Span",
    "non span": "None span",
    "table/list": "Table/list",
    "textual": "Text",
    "photo/pciture/visual_objects": "Visual/Layout",
    "figure": "Figure",
    "map": "Map",
    "comparison": "Sorting",
    "arithmetic": "Arithmetic",
    "counting": "Counting",
}


@SCORERS.register("infovqa")
class InfoVQAScorer(AnlsScorer):
    """A share of 1. ``gold``: all accepted answers. See `AnlsScorer` for the four rules.

    Where questions say of what kind they are, the official script's means by kind are told as well; a
    question of two kinds counts in both, and a kind that no question has is left out.
    """

    optional: ClassVar = {
        "answer_type": "where the answer stands: a list",
        "evidence": "what holds it: a list",
        "operation/reasoning": "what is done to find it: a list",
    }

    def summarise(self, rows: Sequence[Row], judged: Sequence[Judged], protocol: str) -> Summary:
        """The mean over all questions, and with the official script also by kind of question."""
        summary = super().summarise(rows, judged, protocol)
        if protocol != self.official():
            return summary
        kinds: dict[str, float | Summary] = {}
        for field, name in _KINDS.items():
            groups = grouped(
                (_NAMES.get(kind, kind), each.value or 0.0)
                for row, each in zip(rows, judged, strict=True)
                for kind in _listed(row.fields.get(field))
            )
            kinds |= {name: {kind: mean(values) for kind, values in groups.items()}} if groups else {}
        return {**summary, **({"scores_by_types": kinds} if kinds else {})}


def _listed(kinds: Json) -> list[str]:
    return [] if kinds is None else texts(kinds)
