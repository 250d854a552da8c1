"""POPE: does the model see objects that are not there? Accuracy, precision, recall, F1."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, Final, NamedTuple

from vlmix.core.parts import SCORERS
from vlmix.core.sample import Judged, Row
from vlmix.core.scoring import Protocol, Scorer, Summary
from vlmix.evals.scoring._fields import text_of
from vlmix.evals.scoring._tally import UNANSWERED, mean

_OFFICIAL: Final = "pope_official"
_NOES: Final = frozenset({"No", "not", "no"})
_LABELS: Final = frozenset({"yes", "no"})
_CATEGORIES: Final = ("random", "popular", "adversarial")


class _Counts(NamedTuple):
    """Right and wrong yeses, right and wrong noes."""

    tp: int
    fp: int
    tn: int
    fn: int


@SCORERS.register("pope")
class POPEScorer(Scorer):
    """1 or 0. ``gold``: yes or no.

    The official rule reads up to the first full stop, drops commas and splits at single blanks: a word
    ``No``, ``no`` or ``not`` makes it no, and everything else is yes, so also ``NO``, ``None``, ``no!``, a
    ``No`` after a line break, and no text at all; ``Yes, there is no doubt`` is no. A gold that is not the
    very text ``no`` is yes. LLaVA's script pairs answers and labels by their order within a category; here
    they come as pairs, and where there is no answer, its figures count the wrong one.

    lmms-eval takes ``yes`` or ``no`` alone, in any case, and nothing else. It pools the categories, its
    recall forgets answers that are neither, and its yes ratio is that of the gold.
    """

    protocols: ClassVar = {
        _OFFICIAL: Protocol(
            "AoiDragon/POPE@08d957b917e5a378a2f99d35b6293c536a66298b evaluate.py and "
            "haotian-liu/LLaVA@c121f0432da27facab705978f83c4ada465e46fd llava/eval/eval_pope.py"
        ),
        "lmms_eval": Protocol(
            "EvolvingLMMs-Lab/lmms-eval@75571cfe0fa36ca5ec2e6aa2bb268f9d38295af3 "
            "lmms_eval/tasks/pope/utils.py"
        ),
    }
    fields: ClassVar = {"category": "how the absent objects were chosen: random, popular or adversarial"}
    units: ClassVar = {
        f"{category}.{name}": "answers" for category in _CATEGORIES for name in ("TP", "FP", "TN", "FN")
    }

    def judge(self, rows: Sequence[Row], protocol: str) -> list[Judged]:
        """Each row on its own."""
        return [_official(row) if protocol == _OFFICIAL else _lmms(row) for row in rows]

    def summarise(self, rows: Sequence[Row], judged: Sequence[Judged], protocol: str) -> Summary:
        """The figures of each category; lmms-eval's over all."""
        pairs = list(zip(rows, judged, strict=True))
        if protocol != _OFFICIAL:
            return _pooled(pairs)
        categories: dict[str, list[tuple[bool, bool]]] = {}
        for row, each in pairs:
            yes = row.gold != "no"
            categories.setdefault(text_of(row, "category"), []).append((yes, yes == bool(each.value)))
        return {category: _figures(answers) for category, answers in categories.items()}

    def failed(self, row: Row, judged: Judged, protocol: str) -> Judged:
        """The wrong one of the two answers, so that precision and recall count it."""
        return Judged(0.0, "yes" if row.gold == "no" else "no", "failed")


def _official(row: Row) -> Judged:
    if row.answer is None:
        return UNANSWERED
    words = row.answer.partition(".")[0].replace(",", "").split(" ")
    said = "yes" if _NOES.isdisjoint(words) else "no"
    return Judged(float((said == "no") == (row.gold == "no")), said)


def _lmms(row: Row) -> Judged:
    if row.answer is None:
        return UNANSWERED
    said = row.answer.lower().strip()
    value = float(said == str(row.gold).lower().strip())
    return Judged(value, said) if said in _LABELS else Judged(value, state="unparsed")


def _figures(answers: Sequence[tuple[bool, bool]]) -> Mapping[str, float]:
    counts = _counts(answers)
    return {
        **dict(zip(("TP", "FP", "TN", "FN"), counts, strict=True)),
        "Accuracy": (counts.tp + counts.tn) / len(answers),
        **_rates(counts, "Precision", "Recall", "F1 score"),
        "Yes ratio": (counts.tp + counts.fp) / len(answers),
    }


def _pooled(pairs: Sequence[tuple[Row, Judged]]) -> Mapping[str, float]:
    golds = [str(row.gold).lower().strip() == "yes" for row, _ in pairs]
    read = [(gold, each.parsed == "yes") for gold, (_, each) in zip(golds, pairs, strict=True) if each.parsed]
    return {
        "pope_accuracy": mean([each.value or 0.0 for _, each in pairs]),
        **_rates(_counts(read), "pope_precision", "pope_recall", "pope_f1_score"),
        "pope_yes_ratio": mean(golds),
    }


def _counts(answers: Iterable[tuple[bool, bool]]) -> _Counts:
    """From pairs of what is true and what was said."""
    said = list(answers)
    return _Counts(
        *(said.count(pair) for pair in ((True, True), (False, True), (False, False), (True, False)))
    )


def _rates(counts: _Counts, precision: str, recall: str, f1: str) -> Mapping[str, float]:
    yeses, golds = counts.tp + counts.fp, counts.tp + counts.fn
    p, r = (counts.tp / yeses if yeses else 0.0), (counts.tp / golds if golds else 0.0)
    return {precision: p, recall: r, f1: 2 * p * r / (p + r) if p + r else 0.0}
