"""MME's rule under the name of a shared set of answers that LaVIN really gave."""

from __future__ import annotations

from vlmix.core.parts import SCORERS
from vlmix.evals.scoring.mme import MMEScorer


@SCORERS.register("mme_lavin_real")
class MMELavinScorer(MMEScorer):
    """As ``mme``."""
