"""TextCaps: captions that must read the text in a picture; BLEU, ROUGE-L and CIDEr."""

from __future__ import annotations

from vlmix.core.parts import SCORERS
from vlmix.evals.scoring._caption_scorer import CaptionScorer


@SCORERS.register("textcaps")
class TextCapsScorer(CaptionScorer):
    """CIDEr of each picture. See `CaptionScorer` for the rule, which is COCO's."""
