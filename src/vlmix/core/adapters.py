"""Settings of low-rank adapters (LoRA). No torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from vlmix.core.settings import Settings


class AdapterSettings(Settings):
    """One adapter: every Linear whose name a glob of ``match`` fits computes W x + alpha / rank * B A x.

    Names are those that a stage's ``train`` sees (``encoders.0.*q_proj``, ``language_model.*``), without the
    parameter's own at the end. A has ``rank`` rows; ``dropout`` is applied to what A reads.
    Paper: Hu et al., arXiv:2106.09685, section 4.1.
    """

    match: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @property
    def scale(self) -> float:
        """What the product B A is multiplied by."""
        return self.alpha / self.rank


def adapter_name(index: int) -> str:
    """The adapter at place ``index`` of the list in parameter names: ``q_proj.lora_A.adapter_0.weight``."""
    return f"adapter_{index}"
