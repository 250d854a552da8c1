"""COCO captions: BLEU, ROUGE-L and CIDEr against five people's captions."""

from __future__ import annotations

from vlmix.core.parts import SCORERS
from vlmix.evals.scoring._caption_scorer import CaptionScorer


@SCORERS.register("coco_caption")
class CocoCaptionScorer(CaptionScorer):
    """CIDEr of each picture. See `CaptionScorer` for the rule."""
