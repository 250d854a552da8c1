"""NoCaps: captions of things that COCO's pictures do not show; CIDEr overall and by distance from COCO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final

from vlmix.core.parts import SCORERS
from vlmix.core.scoring import Judged, Row, Summary
from vlmix.evals.scoring._caption_scorer import CaptionScorer, captioned, figures

_DOMAINS: Final = ("in-domain", "near-domain", "out-domain")


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

    def summarise(self, rows: Sequence[Row], judged: Sequence[Judged], protocol: str) -> Summary:
        """The figures of the entire set and of each domain that has pictures."""
        summary: dict[str, float | Summary] = {"entire": figures(captioned(rows, protocol), judged)}
        for domain in _DOMAINS:
            if some := [row for row in rows if row.fields.get("domain") == domain]:
                summary[domain] = figures(captioned(some, protocol), self.judge(some, protocol))
        return summary
