"""How large each encoder's map is before the projector, and in how many directions it varies."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmix.evals.diagnostics import DIAGNOSTICS
from vlmix.evals.diagnostics._base import Diagnostic, Finding, Table
from vlmix.evals.diagnostics._subject import Subject
from vlmix.evals.diagnostics._telling import number, rounded


def effective_rank(x_TC: Tensor) -> float:
    """exp of the entropy of the singular values over their sum; 0 of a matrix of zeros.

    Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality", equations 1 to 4.
    """
    values = torch.linalg.svdvals(x_TC.double())
    total = values.sum()
    if not float(total):
        return 0.0
    return float(torch.special.entr(values / total).sum().exp())


@DIAGNOSTICS.register("feature_maps")
class FeatureMaps(Diagnostic):
    """Norm and effective rank of every encoder's map where it enters the fusion."""

    def examine(self, subject: Subject) -> Finding:
        """Measure tokens drawn from many pictures."""
        looks = subject.looks
        rows: list[list[str]] = []
        data: dict[str, object] = {}
        for name, x_TC in zip(subject.encoders, looks.own, strict=True):
            if x_TC is None:
                rows.append([name, *["does not run"], *[""] * 6])
                data[name] = None
                continue
            found = measured(x_TC)
            data[name] = {key: rounded(value) for key, value in found.items()}
            most = f"{min(x_TC.shape):d}"
            cells = [found[key] for key in ("norm", "norm_deviation", "rms")]
            ranks = [found[key] for key in ("effective_rank", "effective_rank_centred")]
            rows.append(
                [name, *map(number, cells), *(number(rank, 1) for rank in ranks), most, str(len(x_TC))]
            )
        columns = ("encoder", "token norm", "deviation", "rms of a channel", "effective rank", "centred")
        return Finding(
            title="Feature maps before the projector",
            reading=(
                "Norm: mean length of a token, with its deviation over tokens; a map much larger than others "
                "drowns them where channels are stacked without a norm. Effective rank: how many equally "
                "strong directions would be as varied, of the tokens as they are and with their mean taken "
                "away (a large common offset alone makes the first one small); `at most` is its upper end.",
            ),
            tables=[
                Table(f"tokens of {looks.pictures} pictures", (*columns, "at most", "tokens"), rows),
            ],
            data={"pictures": looks.pictures, "encoders": data},
        )


def measured(x_TC: Tensor) -> dict[str, float]:
    """Norms and ranks of tokens."""
    norms_T = x_TC.norm(dim=1)
    return {
        "norm": float(norms_T.mean()),
        "norm_deviation": float(norms_T.std(correction=0)),
        "rms": float(x_TC.square().mean().sqrt()),
        "effective_rank": effective_rank(x_TC),
        "effective_rank_centred": effective_rank(x_TC - x_TC.mean(0)),
        "tokens": float(len(x_TC)),
        "channels": float(x_TC.shape[1]),
    }
