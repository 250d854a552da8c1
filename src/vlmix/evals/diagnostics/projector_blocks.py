"""How much of the projector's first layer reads each encoder, where channels have columns of their own."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from vlmix.evals.diagnostics import DIAGNOSTICS
from vlmix.evals.diagnostics._base import Diagnostic, Finding, Table
from vlmix.evals.diagnostics._subject import Subject
from vlmix.evals.diagnostics._telling import number, percent, rounded
from vlmix.fusion.channel_concat import ChannelConcat
from vlmix.projectors.linear import LinearProjector
from vlmix.projectors.mlp import MlpProjector


def first_weight(projector: nn.Module) -> Tensor | None:
    """The weight (D, C) of the layer that reads the fused map's channels, if there is a plain one."""
    if isinstance(projector, MlpProjector):
        first = cast("nn.Sequential", projector.layers)[0]
    elif isinstance(projector, LinearProjector):
        first = projector.linear
    else:
        return None
    return first.weight if type(first) is nn.Linear else None


@DIAGNOSTICS.register("projector_blocks")
class ProjectorBlocks(Diagnostic):
    """Norms of the column blocks of the projector's first weight, and of what passes through each."""

    def obstacle(self, subject: Subject) -> str:
        """Columns belong to encoders where channels are stacked and a plain Linear reads them."""
        model = subject.model.model
        if isinstance(model.fusion, ChannelConcat) and first_weight(model.projector) is not None:
            return ""
        fusion, projector = model.config.fusion_settings().kind, model.config.projector_settings().kind
        return (
            "Columns belong to encoders only where channel_concat meets a plain Linear of an mlp or linear "
            f"projector; this model has {fusion} and {projector}, perhaps with experts or adapters in it."
        )

    def examine(self, subject: Subject) -> Finding:
        """Cut the weight where the encoders' channels end."""
        model = subject.model.model
        weight_DC = cast("Tensor", first_weight(model.projector)).detach().double().cpu()
        channels = [spec.channels for spec in model.viewing.plan.offered]
        blocks, parts = weight_DC.split(channels, dim=1), subject.looks.fused.split(channels, dim=1)
        passed = [x_TC @ block_DC.T for x_TC, block_DC in zip(parts, blocks, strict=True)]
        sizes = [float(y_TD.norm(dim=1).mean()) for y_TD in passed]
        norms = [float(block.norm()) for block in blocks]
        columns = [norm / count**0.5 for norm, count in zip(norms, channels, strict=True)]
        shares = [size / sum(sizes) if sum(sizes) else None for size in sizes]
        each = zip(subject.encoders, channels, norms, columns, sizes, shares, strict=True)
        rows = [
            [name, str(count), number(norm), number(column), number(size), percent(share)]
            for name, count, norm, column, size, share in each
        ]
        names = ("encoder", "channels", "block norm", "norm of a column", "what it adds", "share %")
        return Finding(
            title="Column blocks of the projector",
            reading=(
                "The first layer adds up W_i f_i over the encoders. Block norm: the Frobenius norm of W_i; "
                "norm of a column: divided by the root of its channels, to compare encoders of different "
                "width. What it adds: mean length of W_i f_i over tokens; the map's size counts as well.",
            ),
            tables=[Table("first weight of the projector", names, rows)],
            data={
                name: {
                    "channels": count,
                    "norm": rounded(norm),
                    "column": rounded(column),
                    "adds": rounded(size),
                    "share": rounded(share),
                }
                for name, count, norm, column, size, share in zip(
                    subject.encoders, channels, norms, columns, sizes, shares, strict=True
                )
            },
        )
