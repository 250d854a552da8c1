"""DocVQA: words of a scanned page, by edit distance (ANLS)."""

from __future__ import annotations

from vlmix.core.parts import SCORERS
from vlmix.evals.scoring._anls import AnlsScorer


@SCORERS.register("docvqa")
class DocVQAScorer(AnlsScorer):
    """A share of 1. ``gold``: all accepted answers. See `AnlsScorer` for the four rules."""
