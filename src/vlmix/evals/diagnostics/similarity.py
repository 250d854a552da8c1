"""How alike two encoders' maps are: linear CKA, debiased, at the same places of the same pictures."""

from __future__ import annotations

from torch import Tensor

from vlmix.evals.diagnostics import DIAGNOSTICS
from vlmix.evals.diagnostics._base import Diagnostic, Figure, Finding, Table
from vlmix.evals.diagnostics._drawing import matrix_picture
from vlmix.evals.diagnostics._subject import Subject
from vlmix.evals.diagnostics._telling import number, rounded

LEAST = 4
"""The estimator divides by n - 3."""


def hsic(k_TT: Tensor, l_TT: Tensor) -> float:
    """The unbiased estimate of the Hilbert-Schmidt independence criterion from two Gram matrices.

    Song et al. 2012 (JMLR 13), equation 5, as Nguyen et al. 2021 (arXiv:2010.15327), equation 3, use it.
    Their diagonals must be zero; at least four tokens.
    """
    n = len(k_TT)
    sums_k, sums_l = k_TT.sum(1), l_TT.sum(1)
    both = (k_TT * l_TT).sum() + sums_k.sum() * sums_l.sum() / ((n - 1) * (n - 2))
    return float((both - 2 / (n - 2) * (sums_k @ sums_l)) / (n * (n - 3)))


def gram(x_TC: Tensor) -> Tensor:
    """Products of every two tokens (T, T) without the diagonal; tokens are centred first, for precision."""
    x_TC = x_TC.double()
    x_TC = x_TC - x_TC.mean(0)
    return (x_TC @ x_TC.T).fill_diagonal_(0)


def cka(x_TC: Tensor, y_TE: Tensor) -> float | None:
    """Linear CKA of two sets of features of the same tokens: HSIC(x, y) / sqrt(HSIC(x, x) HSIC(y, y)).

    Kornblith et al. 2019 (arXiv:1905.00414), with the unbiased estimate. 1 of maps that are equal up to
    rotation and scale, about 0 of unrelated ones, also where there are more channels than tokens. ``None``
    where a map does not vary, or there are fewer than four tokens.
    """
    if len(x_TC) < LEAST:
        return None
    k_TT, l_TT = gram(x_TC), gram(y_TE)
    return _ratio(k_TT, l_TT, hsic(k_TT, k_TT), hsic(l_TT, l_TT))


def _ratio(k_TT: Tensor, l_TT: Tensor, own_k: float, own_l: float) -> float | None:
    product = own_k * own_l
    return hsic(k_TT, l_TT) / product**0.5 if own_k > 0 and own_l > 0 and product > 0 else None


@DIAGNOSTICS.register("similarity")
class Similarity(Diagnostic):
    """CKA of every two encoders."""

    def obstacle(self, subject: Subject) -> str:
        """Two maps with places in common are needed."""
        if len(subject.encoders) < 2:
            return "There is one encoder, so nothing to compare it with."
        common = subject.looks.common
        if common is None:
            return (
                "An encoder gives a strip of tokens without rows, which has no places in common with others."
            )
        if sum(x is not None for x in common) < 2:
            return "Only one encoder runs, so there is nothing to compare it with."
        return ""

    def examine(self, subject: Subject) -> Finding:
        """Compare tokens at the same places, all at once."""
        looks = subject.looks
        maps = looks.common or []
        values = similarities(maps)
        tokens = max(len(x) for x in maps if x is not None)
        names = subject.encoders
        rows = [[name, *(number(value) for value in row)] for name, row in zip(names, values, strict=True)]
        picture = matrix_picture(values, names)
        return Finding(
            title="Similarity of encoders",
            reading=(
                f"Linear CKA, debiased, of {tokens} tokens at the same places of {looks.pictures} pictures, "
                f"on a grid of {looks.common_grid} (finer maps are averaged onto it). 1: the same up to "
                "rotation and scale, so one of the two may be spared; about 0: unrelated. Large channels "
                "count most.",
            ),
            tables=[Table("CKA", ("encoder", *names), rows)],
            figures=[Figure("similarity", picture, "CKA of every two encoders.")],
            data={
                "encoders": names,
                "tokens": tokens,
                "grid": list(looks.common_grid or ()),
                "cka": [[rounded(value) for value in row] for row in values],
            },
        )


def similarities(maps: list[Tensor | None]) -> list[list[float | None]]:
    """CKA of every two maps of the same tokens; ``None`` where one is missing or does not vary."""
    grams = [None if x is None or len(x) < LEAST else gram(x) for x in maps]
    own = [0.0 if k is None else hsic(k, k) for k in grams]
    return [
        [
            None if k is None or other is None else _ratio(k, other, own[i], own[j])
            for j, other in enumerate(grams)
        ]
        for i, k in enumerate(grams)
    ]
