"""NoCaps: captions of things that COCO's pictures do not show; CIDEr overall and by distance from COCO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Final

from vlmix.core.parts import SCORERS
from vlmix.core.sample import Judged, Row
from vlmix.core.scoring import Summary
from vlmix.evals.scoring._caption_scorer import CaptionScorer, figures
from vlmix.evals.scoring._captions import cider

_DOMAINS: Final = ("in-domain", "near-domain", "out-domain")
_WITHIN: Final = "CIDEr in its domain"


@SCORERS.register("nocaps")
class NoCapsScorer(CaptionScorer):
    """CIDEr of each picture among all. See `CaptionScorer` for the rule, which is COCO's.

    A domain's figures are those of its pictures scored as a set of their own, so that rare words are those
    rare within it; they are no means of the pictures' scores.
    """

    optional: ClassVar = {"domain": "in-domain, near-domain or out-domain"}
    units: ClassVar = {
        f"{group}.CIDEr": "CIDEr (papers print 100 times that)" for group in ("entire", *_DOMAINS)
    }

    def judge(self, rows: Sequence[Row], protocol: str) -> list[Judged]:
        """Each row among all rows; ``detail`` has its CIDEr among the rows of its domain too."""
        judged = super().judge(rows, protocol)
        for domain in _DOMAINS:
            places = [place for place, row in enumerate(rows) if row.fields.get("domain") == domain]
            scores = cider(self.captioned([rows[place] for place in places], protocol))
            for place, score in zip(places, scores, strict=True):
                each = judged[place]
                judged[place] = replace(each, detail={**each.detail, _WITHIN: score})
        return judged

    def summarise(self, rows: Sequence[Row], judged: Sequence[Judged], protocol: str) -> Summary:
        """The figures of the entire set and of each domain that has pictures.

        Of a part of the rows that were judged, words are as rare as they are in all of them.
        """
        summary: dict[str, float | Summary] = {"entire": figures(self.captioned(rows, protocol), judged)}
        for domain in _DOMAINS:
            some = [
                (row, replace(each, value=each.detail.get(_WITHIN, 0.0)))
                for row, each in zip(rows, judged, strict=True)
                if row.fields.get("domain") == domain
            ]
            if some:
                pictures = self.captioned([row for row, _ in some], protocol)
                summary[domain] = figures(pictures, [each for _, each in some])
        return summary
