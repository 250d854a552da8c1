"""Plain fine-tuning on one task after another: what every other method is compared with."""

from __future__ import annotations

from typing import Literal

from vlmix.train.continual import CONTINUAL
from vlmix.train.continual._base import Method, NoSettings


class NaiveSettings(NoSettings):
    """Nothing to set."""

    kind: Literal["naive"] = "naive"  # pyright: ignore[reportIncompatibleVariableOverride]


@CONTINUAL.register("naive")
class Naive(Method):
    """Does nothing at every hook."""

    settings_class = NaiveSettings
