"""The rule that all caption benchmarks share: tokens, then BLEU, ROUGE-L and CIDEr."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice
from typing import ClassVar, Final

from vlmix.core.errors import InputError
from vlmix.core.sample import Judged, Row
from vlmix.core.scoring import Protocol, Scorer, Summary
from vlmix.evals.scoring._captions import Captioned, bleu, bleu_of_all, cider, rouge_l
from vlmix.evals.scoring._ptb import tokenize
from vlmix.evals.scoring._tally import mean, texts

PTB: Final = "ptb"
SIMPLE: Final = "simple"
_ROUGE: Final = "ROUGE_L"
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

    def __init__(self) -> None:
        self._references: dict[tuple[str, str, tuple[str, ...]], Sequence[str]] = {}
        self._pictures: dict[tuple[str, str, tuple[str, ...], str | None], Captioned] = {}

    def judge(self, rows: Sequence[Row], protocol: str) -> list[Judged]:
        """Each row among all rows."""
        pictures = self.captioned(rows, protocol)
        each_bleu, _ = bleu(pictures)
        return [
            Judged(
                score,
                picture.answer,
                "missing" if row.answer is None else "read",
                {**scores, _ROUGE: rouge_l(picture)},
            )
            for row, picture, scores, score in zip(rows, pictures, each_bleu, cider(pictures), strict=True)
        ]

    def summarise(self, rows: Sequence[Row], judged: Sequence[Judged], protocol: str) -> Summary:
        """BLEU of the whole set, and the means of ROUGE-L and CIDEr."""
        return figures(self.captioned(rows, protocol), judged)

    def captioned(self, rows: Sequence[Row], protocol: str) -> list[Captioned]:
        """The tokens of each row's captions and answer; captions are read together, then answers.

        Rows that were read before are not read again: intervals sum up a hundred parts of one set.

        Raises:
            InputError: if a row has no caption.

        """
        golds = [tuple(texts(row.gold)) for row in rows]
        if bare := next((row for row, some in zip(rows, golds, strict=True) if not some), None):
            raise InputError(f"picture {bare.id} has no caption in `gold`; give at least one")
        words = _simple if protocol == SIMPLE else tokenize
        asked = [(protocol, row.id, some) for row, some in zip(rows, golds, strict=True)]
        if any(key not in self._references for key in asked):
            read = iter(words([gold for some in golds for gold in some]))
            self._references |= {key: list(islice(read, len(key[-1]))) for key in asked}
        keys = [(*key, row.answer) for key, row in zip(asked, rows, strict=True)]
        if any(key not in self._pictures for key in keys):
            answers = words([row.answer or "" for row in rows])
            self._pictures |= {
                key: Captioned(answer, self._references[key[:3]])
                for key, answer in zip(keys, answers, strict=True)
            }
        return [self._pictures[key] for key in keys]


def figures(pictures: Sequence[Captioned], judged: Sequence[Judged]) -> dict[str, float | Summary]:
    """The figures of a set whose pictures were judged together; one that could not be asked counts 0."""
    return {
        **bleu_of_all(pictures),
        _ROUGE: mean([each.detail.get(_ROUGE, 0.0) for each in judged]),
        "CIDEr": mean([each.value or 0.0 for each in judged]),
    }


def _simple(captions: Sequence[str]) -> list[str]:
    return [" ".join(_SIMPLE_WORD.findall(caption.lower())) for caption in captions]
