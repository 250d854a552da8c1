"""The rule that all caption benchmarks share: tokens, then BLEU, ROUGE-L and CIDEr."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice
from typing import ClassVar, Final

from vlmix.core.errors import InputError
from vlmix.core.scoring import Judged, Protocol, Row, Scorer, Summary
from vlmix.evals.scoring._captions import Captioned, bleu, cider, rouge_l
from vlmix.evals.scoring._ptb import tokenize
from vlmix.evals.scoring._tally import mean, texts

PTB: Final = "ptb"
SIMPLE: Final = "simple"
_SIMPLE_WORD: Final = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")


class CaptionScorer(Scorer):
    """CIDEr, from 0 to 10; ``detail`` has BLEU and ROUGE-L. ``gold``: all captions of the picture.

    CIDEr weighs a word by how few pictures of the set have it in their captions: a picture's score is that
    within the rows it is scored with, and a single row scores 0. ROUGE takes the best precision and the best
    recall from whichever captions have them, and gives 1 for an empty answer to an empty caption. BLEU of
    all pictures is no mean. Tokens are Stanford's (see `tokenize`): brackets become words, ``n't`` and ``'s``
    stand alone, ``a.m.`` keeps its dots. ``simple`` takes runs of small letters and digits instead, dropping
    every other script. METEOR and SPICE, which need Java, are left out. A missing answer is an empty one.
    """

    protocols: ClassVar = {
        PTB: Protocol("PyPI pycocoevalcap 1.2: PTBTokenizer, Bleu, Rouge, Cider", full=10.0),
        SIMPLE: Protocol("PyPI pycocoevalcap 1.2: Bleu, Rouge, Cider on runs of a-z and 0-9", full=10.0),
    }
    units: ClassVar = {"CIDEr": "CIDEr (papers print 100 times that)"}

    def judge(self, rows: Sequence[Row], protocol: str) -> list[Judged]:
        """Each row among all rows."""
        pictures = captioned(rows, protocol)
        each_bleu, _ = bleu(pictures)
        return [
            Judged(
                score,
                picture.answer,
                "missing" if row.answer is None else "read",
                {**scores, "ROUGE_L": rouge_l(picture)},
            )
            for row, picture, scores, score in zip(rows, pictures, each_bleu, cider(pictures), strict=True)
        ]

    def summarise(self, rows: Sequence[Row], judged: Sequence[Judged], protocol: str) -> Summary:
        """BLEU of the whole set, and the means of ROUGE-L and CIDEr."""
        return figures(captioned(rows, protocol), judged)


def figures(pictures: Sequence[Captioned], judged: Sequence[Judged]) -> dict[str, float | Summary]:
    """The figures of a set whose pictures were judged together."""
    return {
        **bleu(pictures)[1],
        "ROUGE_L": mean([each.detail["ROUGE_L"] for each in judged]),
        "CIDEr": mean([each.value or 0.0 for each in judged]),
    }


def captioned(rows: Sequence[Row], protocol: str) -> list[Captioned]:
    """The tokens of each row's captions and answer; captions are read together, then answers.

    Raises:
        InputError: if a row has no caption.

    """
    golds = [texts(row.gold) for row in rows]
    if bare := next((row for row, some in zip(rows, golds, strict=True) if not some), None):
        raise InputError(f"picture {bare.id} has no caption in `gold`; give at least one")
    words = _simple if protocol == SIMPLE else tokenize
    references = iter(words([gold for some in golds for gold in some]))
    answers = words([row.answer or "" for row in rows])
    return [
        Captioned(answer, list(islice(references, len(some))))
        for answer, some in zip(answers, golds, strict=True)
    ]


def _simple(captions: Sequence[str]) -> list[str]:
    return [" ".join(_SIMPLE_WORD.findall(caption.lower())) for caption in captions]
