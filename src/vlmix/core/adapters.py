"""Settings of low-rank adapters (LoRA, DoRA, QLoRA). No torch."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from vlmix.core.settings import Settings


class AdapterSettings(Settings):
    """One adapter: every Linear whose name a glob of ``match`` fits computes W x + s B A x.

    Names are those that a stage's ``train`` sees (``encoders.0.*q_proj``, ``projector.*``), without the
    parameter's own at the end. A has ``rank`` rows, or ``rank_share`` of what the matrix could have at most;
    s is ``alpha`` over the rank or, ``rank_stabilised``, over its root; ``dropout`` is applied to what A
    reads. With ``dora`` rows of W + s B A are rescaled to trained lengths. ``quantise`` keeps W in 4 bits.
    Papers: Hu et al., arXiv:2106.09685, section 4.1; rsLoRA, arXiv:2312.03732; DoRA, arXiv:2402.09353;
    QLoRA, arXiv:2305.14314.
    """

    match: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    rank: PositiveInt | None = 16
    rank_share: Annotated[float, Field(gt=0, le=1)] | None = None
    alpha: PositiveFloat = 32.0
    scaling: Literal["rank", "rank_stabilised"] = "rank"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    dora: bool = False
    quantise: Literal["nf4"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _share_alone(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """A share takes the place of the default rank."""
        return raw if raw.get("rank_share") is None else {"rank": None, **raw}

    @model_validator(mode="after")
    def _one_rank(self) -> Self:
        if (self.rank is None) == (self.rank_share is None):
            raise ValueError("give exactly one of `rank` and `rank_share`")
        return self

    def rank_of(self, inputs: int, outputs: int) -> int:
        """The rank of the adapter on a Linear of these widths."""
        if self.rank is not None:
            return self.rank
        return max(1, round((self.rank_share or 0) * min(inputs, outputs)))

    def scale(self, rank: int) -> float:
        """What the product B A of this rank is multiplied by."""
        return self.alpha / (math.sqrt(rank) if self.scaling == "rank_stabilised" else rank)


def adapter_name(index: int) -> str:
    """The adapter at place ``index`` of the list in parameter names: ``q_proj.lora_A.adapter_0.weight``."""
    return f"adapter_{index}"
