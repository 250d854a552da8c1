"""What one expert layer did, summed up over any number of batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlmix.core.tensors import Routing

UNUSED: Final = 0.1
"""An expert below a tenth of its even share is unused: it costs memory and hardly ever works."""
GROUPS: Final = ("visual", "text", "whole")
"""What a decision was about: a visual token, a text token, or a whole row or picture."""

Rule = Literal["tokens choose", "experts choose", "all mix"]


@dataclass(frozen=True, slots=True)
class Choices:
    """Which experts each of T decisions took, on the CPU.

    ``ranked`` holds them in order of choice, -1 where there are no more; ``kept`` is false of
    dropped ones.
    """

    ranked: Int[Tensor, "t k"]
    chosen: Bool[Tensor, "t e"]
    kept: Bool[Tensor, "t e"]
    weights: Float[Tensor, "t e"]

    @property
    def first(self) -> Tensor:
        """Each decision's first choice, -1 if no expert took it."""
        return self.ranked[:, 0]


def rule_of(routing: Routing) -> Rule:
    """Who chooses whom."""
    if routing.mixing is not None:
        return "all mix"
    return "tokens choose" if routing.rows is None else "experts choose"


def choices_of(routing: Routing) -> Choices:
    """The choices behind a routing that has any; where everything is mixed there are none.

    Where experts choose, a token's experts are in the order of their weights.
    """
    decisions, experts = routing.logits.shape
    indices_RK, weights_RK = routing.indices.cpu(), routing.weights.detach().double().cpu()
    token_R = torch.arange(decisions) if routing.rows is None else routing.rows.cpu()
    kept_RK = torch.ones_like(indices_RK, dtype=torch.bool) if routing.kept is None else routing.kept.cpu()
    token_RK = token_R.unsqueeze(1).expand_as(indices_RK)
    chosen_TE, kept_TE = (torch.zeros(decisions, experts, dtype=torch.bool) for _ in range(2))
    weights_TE = torch.zeros(decisions, experts, dtype=torch.float64)
    chosen_TE[token_RK, indices_RK] = True
    kept_TE[token_RK, indices_RK] = kept_RK
    weights_TE[token_RK, indices_RK] = weights_RK
    if routing.rows is None:
        return Choices(indices_RK, chosen_TE, kept_TE, weights_TE)
    order_TE = weights_TE.masked_fill(~chosen_TE, -torch.inf).argsort(stable=True, dim=-1, descending=True)
    ranked_TE = order_TE.masked_fill(~chosen_TE.gather(1, order_TE), -1)
    return Choices(ranked_TE, chosen_TE, kept_TE, weights_TE)


@dataclass(slots=True)
class Tally:
    """Sums of one layer, by group (see ``GROUPS``) and expert: (G, E), on the CPU.

    ``tokens`` (G,) are decisions. ``choices`` counts all k choices of each, dropped ones included, ``first``
    the first ones alone, ``dropped`` those an expert had no place for. ``weights`` sums what the chosen
    experts' outputs were multiplied by, ``shares`` the router's probabilities, chosen or not. ``entropy``
    (G,) sums that of the probabilities, in nats. ``unserved`` (G,) are decisions that no expert served.
    ``norms`` sums how large what each expert added was, where that was recorded.
    ``together`` (E, E) counts how often two experts were chosen by one token; the diagonal is each one's
    choices. Where all tokens mix nothing is chosen: ``shares`` are the load, and counts stay 0.
    """

    experts: int
    rule: Rule = "tokens choose"
    tokens: Tensor = field(init=False)
    choices: Tensor = field(init=False)
    first: Tensor = field(init=False)
    dropped: Tensor = field(init=False)
    weights: Tensor = field(init=False)
    shares: Tensor = field(init=False)
    norms: Tensor = field(init=False)
    entropy: Tensor = field(init=False)
    unserved: Tensor = field(init=False)
    together: Tensor = field(init=False)

    def __post_init__(self) -> None:
        groups, experts = len(GROUPS), self.experts
        self.tokens, self.unserved = (torch.zeros(groups, dtype=torch.int64) for _ in range(2))
        self.choices, self.first, self.dropped = (
            torch.zeros(groups, experts, dtype=torch.int64) for _ in range(3)
        )
        self.weights, self.shares, self.norms = (
            torch.zeros(groups, experts, dtype=torch.float64) for _ in range(3)
        )
        self.entropy = torch.zeros(groups, dtype=torch.float64)
        self.together = torch.zeros(experts, experts, dtype=torch.int64)

    def add(self, routing: Routing, group_T: Tensor) -> Choices | None:
        """Count one batch; ``group_T`` is each decision's group, -1 of those that do not count."""
        self.rule = rule_of(routing)
        shares_TE = routing.probabilities.detach().double().cpu()
        member_TG = F.one_hot(group_T + 1, len(GROUPS) + 1)[:, 1:]
        sums_GT = member_TG.T.double()
        self.tokens += member_TG.sum(0)
        self.shares += sums_GT @ shares_TE
        self.entropy += sums_GT @ torch.special.entr(shares_TE).sum(-1)
        if routing.mixing is not None:
            return None
        found = choices_of(routing)
        chosen_TE, counted_T = found.chosen.double(), group_T >= 0
        first_TE = F.one_hot(found.first + 1, self.experts + 1)[:, 1:]
        self.choices += (sums_GT @ chosen_TE).long()
        self.first += (sums_GT @ first_TE.double()).long()
        self.dropped += (sums_GT @ (found.chosen & ~found.kept).double()).long()
        self.weights += sums_GT @ found.weights
        if routing.norms is not None and routing.rows is None:
            norms_TK = routing.norms.detach().double().cpu()
            self.norms += sums_GT @ torch.zeros_like(shares_TE).scatter(1, found.ranked, norms_TK)
        self.unserved += (sums_GT @ (~found.kept.any(-1)).double()).long()
        self.together += (chosen_TE[counted_T].T @ chosen_TE[counted_T]).long()
        return found

    @property
    def takes_all(self) -> bool:
        """Whether every decision took every expert, so that choices say nothing."""
        return int(self.choices.sum()) == int(self.tokens.sum()) * self.experts

    @property
    def loads(self) -> Tensor:
        """What each expert was given, by group: (G, E).

        Choices; the weights where all are chosen anyway, and the shares where all tokens mix.
        """
        if self.rule == "all mix":
            return self.shares
        return self.weights if self.takes_all else self.choices.double()

    def merge(self, other: Tally) -> None:
        """Add what another one counted of the same layer."""
        if int(other.tokens.sum()):
            self.rule = other.rule
        for name in _SUMS:
            getattr(self, name).add_(getattr(other, name))

    def to_json(self) -> dict[str, Any]:
        """What ``from_json`` reads."""
        sums = {name: getattr(self, name).tolist() for name in _SUMS}
        return {"experts": self.experts, "rule": self.rule, **sums}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """The tally that ``to_json`` wrote."""
        made = cls(raw["experts"], raw["rule"])
        for name in _SUMS:
            sums = getattr(made, name)
            sums.copy_(torch.tensor(raw[name], dtype=sums.dtype))
        return made


_SUMS: Final = tuple(item.name for item in fields(Tally) if not item.init)
