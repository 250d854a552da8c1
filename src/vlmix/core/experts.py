"""Settings of a mixture of experts: where it stands, what its experts are, who chooses, how it is balanced.

No torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from vlmix.core.settings import Settings

Place = Annotated[str, Field(pattern=r"^(language_model|encoders\.\d+|fusion|projector)$")]
Share = Annotated[float, Field(ge=0, le=1)]


class BalanceSettings(Settings):
    """What is added to the loss so that experts share the work.

    ``switch`` weighs E * sum_e f_e * P_e, averaged over the layers of the mixture: it is 1 where every expert
    has the same load. f_e is the share of choices that fell on expert e, all of a token's ``choices`` or the
    first alone; P_e its mean probability. ``z`` weighs the mean squared log-sum-exp of the logits.
    ``padding`` says whether padded positions count; ``per_modality`` balances visual and text tokens each by
    itself. ``bias_rate`` is the step of routers that are balanced by a bias instead.
    Papers: Switch Transformer, arXiv:2101.03961, equation 4; ST-MoE, arXiv:2202.08906, equation 5;
    auxiliary-loss-free balancing, arXiv:2408.15664.
    """

    switch: NonNegativeFloat = 0.01
    z: NonNegativeFloat = 0.0
    choices: Literal["all", "first"] = "all"
    padding: Literal["masked", "counted"] = "masked"
    per_modality: bool = False
    bias_rate: NonNegativeFloat = 0.0


class ExpertSettings(Settings):
    """One mixture: experts in the feed-forward networks of one part of the model.

    ``place`` is ``language_model``, ``encoders.N``, ``fusion`` or ``projector``. ``layers`` says which of
    the networks there, counted from 0: ``interval`` (0, 2, 4 …), ``first_half``, ``second_half``, ``all`` or
    their numbers. ``count`` is the number of experts, or one number for each of those layers.

    ``kind``: ``ffn`` makes each expert a copy of the network; ``adapter`` leaves it in place with small
    networks of inner ``width`` beside it; ``lora`` puts low-rank pairs of ``width`` rows on its Linears,
    scaled by ``alpha / width``. Experts of kind ``ffn`` may have an inner ``width`` of their own and then
    start from random weights.

    With ``scope: token`` each token is sent on its own; with ``instance`` a whole row (a conversation, a
    picture) goes one way. ``shared`` networks beside the experts see every token; ``residual`` keeps the
    dense network too and blends it with the experts by a learnt share (DeepSpeed's residual mixture).

    Copies may start apart: ``noise`` multiplies each weight by 1 + noise * n, n normal; ``redraw`` draws that
    share of each expert's inner units anew (drop-upcycling, arXiv:2502.19261).
    """

    place: Place = "language_model"
    layers: Literal["interval", "first_half", "second_half", "all"] | tuple[NonNegativeInt, ...] = "interval"
    count: PositiveInt | tuple[PositiveInt, ...] = 4
    kind: Literal["ffn", "adapter", "lora"] = "ffn"
    scope: Literal["token", "instance"] = "token"
    router: dict[str, Any] = Field(default_factory=lambda: {"kind": "topk"})
    width: PositiveInt | None = None
    alpha: PositiveFloat = 16.0
    shared: NonNegativeInt = 0
    residual: bool = False
    noise: NonNegativeFloat = 0.0
    redraw: Share = 0.0
    balance: BalanceSettings = BalanceSettings()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.kind != "ffn" and self.width is None:
            raise ValueError(f"kind {self.kind} needs `width`, the inner width of an expert")
        if self.kind != "ffn" and (self.shared or self.residual or self.noise or self.redraw):
            raise ValueError("`shared`, `residual`, `noise` and `redraw` are for experts of kind ffn")
        return self

    @property
    def copies(self) -> bool:
        """Whether experts start as copies of the dense network, as far as ``redraw`` leaves them."""
        return self.kind == "ffn" and self.width is None
