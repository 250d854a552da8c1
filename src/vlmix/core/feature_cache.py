"""Where frozen encoders' outputs are kept. No torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveFloat

from vlmix.core.settings import Settings


class FeatureCacheSettings(Settings):
    """Outputs of frozen encoders on disk; they decide no weight, so that all of this may change on resuming.

    ``folder`` serves any number of runs and recipes; without one they are below the run's own folder and go
    when it has finished. ``limit_gb`` (10^9 bytes) is what they take at most. Without ``use`` no stage reads
    or writes any, whatever it says.
    """

    use: bool = True
    folder: Annotated[str, Field(min_length=1)] | None = None
    limit_gb: PositiveFloat = 50.0
