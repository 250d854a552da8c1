"""Average normalised Levenshtein similarity (ANLS; Biten et al. 2019), as four scripts compute it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final

from vlmix.core.sample import Judged, Row
from vlmix.core.scoring import Protocol, Scorer, Summary
from vlmix.evals.scoring._edits import edit_distance
from vlmix.evals.scoring._tally import UNANSWERED, mean, texts

_OFFICIAL: Final = "rrc_script"
_PIX2STRUCT: Final = "pix2struct"
_M4C: Final = "m4c_stvqa_anls"
_THRESHOLD: Final = 0.5


class AnlsScorer(Scorer):
    """A share of 1: how near the answer is to the nearest of ``gold``; below one half it is 0.

    The script of the Robust Reading Competition (the copy for InfographicVQA; the one for DocVQA is not
    public) and lmms-eval count edits between lower-cased texts with single blanks, but divide by the longer
    of the raw texts: blanks around a gold answer forgive errors. German sharp s counts two there. Exactly
    one half stays one half; Pix2Struct makes it 0. Pix2Struct lower-cases only, M4C strips as well; both
    divide by 0 where answer and a gold one are empty, and have no value then.
    """

    protocols: ClassVar = {
        _OFFICIAL: Protocol(
            "QwenLM/Qwen-VL@aa00ed04091eea5fcdd32985e7915f1c53e7d599 eval_mm/infographicsvqa_eval.py"
        ),
        "lmms_eval": Protocol(
            "EvolvingLMMs-Lab/lmms-eval@75571cfe0fa36ca5ec2e6aa2bb268f9d38295af3 lmms_eval/api/metrics.py"
        ),
        _PIX2STRUCT: Protocol(
            "google-research/pix2struct@945f27e936c9464d9d7c133f1bd1f4f383be9e99 pix2struct/metrics.py"
        ),
        _M4C: Protocol(
            "haotian-liu/LLaVA@c121f0432da27facab705978f83c4ada465e46fd llava/eval/m4c_evaluator.py"
        ),
    }
    units: ClassVar = {"anls_percent": "%"}

    def judge(self, rows: Sequence[Row], protocol: str) -> list[Judged]:
        """Each row on its own."""
        return [_judge(row, protocol) for row in rows]

    def summarise(self, rows: Sequence[Row], judged: Sequence[Judged], protocol: str) -> Summary:
        """The mean over all questions, but those for which the protocol divides by 0; no answer counts 0."""
        average = mean(counted(judged))
        if protocol == _PIX2STRUCT:
            return {"anls_percent": 100 * average}
        return {{_OFFICIAL: "score", _M4C: "accuracy"}.get(protocol, "anls"): average}


def counted(judged: Sequence[Judged]) -> list[float]:
    """The values that a mean is over."""
    return [each.value or 0.0 for each in judged if each.value is not None or each.state == "missing"]


def _judge(row: Row, protocol: str) -> Judged:
    if row.answer is None:
        return UNANSWERED
    golds, answer = texts(row.gold), row.answer
    if protocol not in {_PIX2STRUCT, _M4C}:
        shares = [_distance_over_raw_length(gold, answer) for gold in golds]
        share = 1 - min(shares, default=1.0)
        return Judged(share if share >= _THRESHOLD else 0.0, _collapsed(answer))
    said = _trimmed(answer, protocol)
    pairs = [
        (edit_distance(said, gold), max(len(said), len(gold)))
        for gold in (_trimmed(g, protocol) for g in golds)
    ]
    if not all(length for _, length in pairs):
        return Judged(None, said)
    shares = [distance / length for distance, length in pairs]
    if protocol == _M4C:
        return Judged(max((1 - share for share in shares if 1 - share >= _THRESHOLD), default=0.0), said)
    return Judged(max((1 - share for share in shares if share < _THRESHOLD), default=0.0), said)


def _collapsed(text: str) -> str:
    return " ".join(text.lower().split())


def _trimmed(text: str, protocol: str) -> str:
    return text.lower().strip() if protocol == _M4C else text.lower()


def _distance_over_raw_length(gold: str, answer: str) -> float:
    length = max(len(gold.upper()), len(answer.upper()))
    return edit_distance(_collapsed(gold), _collapsed(answer)) / length if length else 0.0
