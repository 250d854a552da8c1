"""GQA: the answer has to be the gold one letter for letter; besides, is it valid, plausible, consistent?"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final

from vlmix.core.parts import SCORERS
from vlmix.core.sample import Judged, Row
from vlmix.core.scoring import Protocol, Scorer, Summary
from vlmix.evals.scoring._tally import UNANSWERED, grouped, mean, percent

_OFFICIAL: Final = "gqa_eval_after_llava_convert"
_RAW: Final = "gqa_eval_raw"
_LMMS: Final = "lmms_eval"
_SCRIPT: Final = "PKU-YuanGroup/MoE-LLaVA@6cb5f66e12d69e57c584a0062f7943d391540676 moellava/eval/eval_gqa.py"
_NO_PUNCTUATION: Final = str.maketrans("", "", string.punctuation)
_COMMON: Final = ("color", "material", "shape")
_NO_STEPS: Final = ("exist", "query: name", "choose name")


@SCORERS.register("gqa")
class GQAScorer(Scorer):
    """1 or 0. ``gold``: one text.

    The data set's own script compares raw text; all that is forgiven comes from LLaVA's conversion, which
    takes full stops off the end and lower-cases but strips nothing: ``red `` is wrong. lmms-eval instead
    lower-cases and deletes all punctuation on both sides, so ``tshirt`` is ``t-shirt`` and ``t shirt`` is
    not. Questions with ``isBalanced: false`` have no value in the data set's script, which only looks them
    up for consistency: of each question that is answered rightly and entails others, the share of those that
    are answered rightly too. ``distribution`` is a chi-square, lower being better.
    """

    protocols: ClassVar = {
        _OFFICIAL: Protocol(
            "haotian-liu/LLaVA@c121f0432da27facab705978f83c4ada465e46fd scripts/convert_gqa_for_eval.py, "
            f"then {_SCRIPT}"
        ),
        _RAW: Protocol(_SCRIPT),
        _LMMS: Protocol(
            "EvolvingLMMs-Lab/lmms-eval@75571cfe0fa36ca5ec2e6aa2bb268f9d38295af3 lmms_eval/api/metrics.py "
            "and lmms_eval/tasks/gqa/gqa.yaml"
        ),
    }
    optional: ClassVar = {
        "isBalanced": "false where the question only serves consistency",
        "question": "its text, for accuracy by length",
        "types": "structural, semantic and detailed type",
        "groups": "the global group, for the distribution of answers",
        "semantic": "the reasoning steps, each an operation and an argument",
        "entailed": "ids of the questions whose answers follow",
        "choices": "valid and plausible answers",
    }
    units: ClassVar = {
        **{
            f"{name}_percent": "%"
            for name in ("binary", "open", "accuracy", "consistency", "validity", "plausibility")
        },
        "distribution": "chi-square",
        **{
            f"accuracyPer{name}_percent": "%"
            for name in ("StructuralType", "SemanticType", "Steps", "Length")
        },
        **{
            f"questionsPer{name}": "questions"
            for name in ("StructuralType", "SemanticType", "Steps", "Length")
        },
    }

    def judge(self, rows: Sequence[Row], protocol: str) -> list[Judged]:
        """Each row on its own."""
        return [_judge(row, protocol) for row in rows]

    def summarise(self, rows: Sequence[Row], judged: Sequence[Judged], protocol: str) -> Summary:
        """What the script prints; validity, plausibility and groups only where questions have the fields.

        An entailed question that is not among the rows is left out, where the script would stop.
        """
        if protocol == _LMMS:
            return {"exact_match": mean([each.value for each in judged if each.value is not None])}
        answered = [(row, each) for row, each in zip(rows, judged, strict=True) if each.state != "missing"]
        right = {row.id: each.parsed == row.gold for row, each in answered}
        balanced = [(row, each.parsed) for row, each in answered if each.value is not None]
        shares = {
            **_by_answer_type(balanced),
            "accuracy": [float(right[row.id]) for row, _ in balanced],
            "consistency": _consistency(balanced, right),
            **_belonging(balanced),
        }
        summary: dict[str, float | Summary] = {
            f"{name}_percent": percent(values) for name, values in shares.items()
        }
        if (distance := _distribution(balanced)) is not None:
            summary["distribution"] = round(distance / 100, 2)
        for name, key in _DETAILS.items():
            groups = grouped(
                (group, float(right[row.id])) for row, _ in balanced if (group := key(row.fields)) is not None
            )
            summary[f"accuracyPer{name}_percent"] = {str(one): percent(groups[one]) for one in sorted(groups)}
            summary[f"questionsPer{name}"] = {str(one): len(groups[one]) for one in sorted(groups)}
        return summary

    def failed(self, row: Row, judged: Judged, protocol: str) -> Judged:
        """Wrong where the question counts; one that is not balanced counts for its group only."""
        counts = protocol == _LMMS or row.fields.get("isBalanced", True)
        return Judged(0.0 if counts else None, state="failed")


def _judge(row: Row, protocol: str) -> Judged:
    if row.answer is None:
        return UNANSWERED
    if protocol == _LMMS:
        answer = _folded(row.answer)
        return Judged(float(answer == _folded(str(row.gold))), answer)
    answer = row.answer.rstrip(".").lower() if protocol == _OFFICIAL else row.answer
    return Judged(float(answer == row.gold) if row.fields.get("isBalanced", True) else None, answer)


def _folded(text: str) -> str:
    """Lower case and no punctuation; NumPy, which lmms-eval does it with, keeps no more characters than came.

    (Nor does it keep NUL characters at the end; lower-casing ``İ`` makes two characters of one.)
    """
    text = text.rstrip("\0")
    return text.lower()[: max(len(text), 1)].translate(_NO_PUNCTUATION)


def _by_answer_type(balanced: list[tuple[Row, str]]) -> dict[str, list[float]]:
    typed = [
        (kind, float(answer == row.gold)) for row, answer in balanced if (kind := _structural(row.fields))
    ]
    return {
        "binary": [right for kind, right in typed if kind != "query"],
        "open": [right for kind, right in typed if kind == "query"],
    }


def _consistency(balanced: list[tuple[Row, str]], right: Mapping[str, bool]) -> list[float]:
    found: list[float] = []
    for row, _ in balanced:
        entailed = [str(other) for other in _list(row.fields.get("entailed")) if str(other) != row.id]
        known = [float(right[other]) for other in entailed if other in right]
        if right[row.id] and known:
            found.append(mean(known))
    return found


def _belonging(balanced: list[tuple[Row, str]]) -> dict[str, list[float]]:
    """Is the answer one that the question allows? Questions on what things share ask for three words only."""
    if not any("choices" in row.fields for row, _ in balanced):
        return {}

    def shares(group: str) -> list[float]:
        allowed = [
            _COMMON
            if "Common" in str(_in(row.fields, "types", "detailed"))
            else _list(_in(row.fields, "choices", group))
            for row, _ in balanced
        ]
        return [float(answer in some) for (_, answer), some in zip(balanced, allowed, strict=True)]

    return {"validity": shares("valid"), "plausibility": shares("plausible")}


def _distribution(balanced: list[tuple[Row, str]]) -> float | None:
    """Chi-square between the counts of gold answers and of answers given, averaged over groups by size."""
    grouped_rows = [
        (str(group), str(row.gold), answer)
        for row, answer in balanced
        if (group := _in(row.fields, "groups", "global")) is not None
    ]
    golds = Counter((group, gold) for group, gold, _ in grouped_rows)
    answers = Counter((group, answer) for group, _, answer in grouped_rows)
    sizes = Counter(group for group, _, _ in grouped_rows)
    if not sizes:
        return None
    total = sum(sizes[key[0]] * (answers[key] - count) ** 2 / count for key, count in golds.items())
    return total / sum(sizes.values())


def _structural(fields: Mapping[str, Any]) -> Any:
    return _in(fields, "types", "structural")


def _steps(fields: Mapping[str, Any]) -> int | None:
    if "semantic" not in fields:
        return None
    told = [f"{step['operation']}: {step['argument']}" for step in _list(fields["semantic"])]
    return sum(not any(word in one for word in _NO_STEPS) for one in told)


def _words(fields: Mapping[str, Any]) -> int | None:
    return len(str(fields["question"]).split()) if "question" in fields else None


_DETAILS: Final[Mapping[str, Callable[[Mapping[str, Any]], Any]]] = {
    "StructuralType": _structural,
    "SemanticType": lambda fields: _in(fields, "types", "semantic"),
    "Steps": _steps,
    "Length": _words,
}


def _in(fields: Mapping[str, Any], outer: str, inner: str) -> Any:
    """A value two levels down; None where either level is absent."""
    held = fields.get(outer)
    return held.get(inner) if isinstance(held, dict) else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
