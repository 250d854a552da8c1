"""The score against how many encoders, and which, are kept: all subsets, also of models to compare with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vlmix.core.errors import InputError
from vlmix.core.sample import Score
from vlmix.evals.diagnostics import DIAGNOSTICS
from vlmix.evals.diagnostics._base import Diagnostic, Figure, Finding, Table
from vlmix.evals.diagnostics._drawing import curves_picture
from vlmix.evals.diagnostics._subject import Answering, Subject
from vlmix.evals.diagnostics._telling import percent, rounded, spread, written
from vlmix.evals.diagnostics.utilisation import MASKING, score_mean
from vlmix.evals.statistics import Interval, mean_interval, paired_difference
from vlmix.fusion.channel_concat import ChannelConcatSettings


@dataclass(frozen=True)
class Curve:
    """One model: the score of every subset, and by number of encoders kept each question's mean over subsets.

    ``trained`` is the ``encoder_dropout`` of its training, ``None`` where its fusion has no such setting.
    """

    name: str
    trained: float | None
    subsets: Mapping[tuple[int, ...], Sequence[Score]]
    means: list[list[Score]]

    def intervals(self, seed: int) -> list[Interval]:
        """The mean score by number of encoders kept."""
        return [mean_interval(scores, seed=seed) for scores in self.means]


@DIAGNOSTICS.register("encoder_dropout")
class EncoderDropout(Diagnostic):
    """Encoder-dropout curves; every subset of encoders is asked, so this waits until it is asked for."""

    def obstacle(self, subject: Subject) -> str:
        """Unasked it would multiply the time."""
        if subject.subsets:
            return ""
        count = 2 ** len(subject.encoders)
        return f"Not asked for: with --subsets all {count} subsets of encoders answer every question."

    def examine(self, subject: Subject) -> Finding:
        """Ask every subset, of every model."""
        others = (_other_curve(open_other(), subject) for open_other in subject.against.values())
        curves = [curve_of(subject.answering), *others]
        found = [curve.intervals(subject.seed) for curve in curves]
        drawn = {_label(curve): rows for curve, rows in zip(curves, found, strict=True)}
        return Finding(
            title="Encoder-dropout curves",
            reading=(
                "Mean score against the number of encoders kept: the mean over all subsets of that size, "
                "with its 95 % interval over questions. With none kept the fusion gets zeros alone. A subset "
                "of one tells what an encoder can do alone in this model, and one that lacks one where it is "
                "missed.",
            ),
            cautions=(MASKING,),
            tables=[
                *[_by_count(curve, rows) for curve, rows in zip(curves, found, strict=True)],
                *[_differences(curves[0], other, subject.seed) for other in curves[1:]],
                *[_by_subset(curve, subject) for curve in curves],
            ],
            figures=[Figure("encoder_dropout", curves_picture(drawn), "Score against encoders kept.")],
            data={"curves": [_data(curve, rows) for curve, rows in zip(curves, found, strict=True)]},
        )


def curve_of(answering: Answering) -> Curve:
    """Ask a model with every subset of its encoders."""
    settings = answering.model.config.fusion_settings()
    subsets = {kept: answering.scores(lost) for kept, lost in answering.subsets()}
    means = [
        _averaged([scores for kept, scores in subsets.items() if len(kept) == count])
        for count in range(len(answering.encoders) + 1)
    ]
    trained = settings.encoder_dropout if isinstance(settings, ChannelConcatSettings) else None
    return Curve(answering.name, trained, subsets, means)


def _averaged(tables: Sequence[Sequence[Score]]) -> list[Score]:
    """Each question's mean over several sets of answers, which are in one order."""
    return [
        replace(rows[0], value=sum(score.value for score in rows) / len(rows))
        for rows in zip(*tables, strict=True)
    ]


def _other_curve(other: Answering, subject: Subject) -> Curve:
    if other.encoders != subject.encoders:
        raise InputError(
            f"--against {other.name}: its encoders are {', '.join(other.encoders)}, those of the model under "
            f"examination {', '.join(subject.encoders)}; subsets can be compared of the same encoders alone"
        )
    return curve_of(other)


def _label(curve: Curve) -> str:
    return curve.name if curve.trained is None else f"{curve.name} (encoder_dropout {curve.trained:g})"


def _by_count(curve: Curve, found: Sequence[Interval]) -> Table:
    rows: list[list[str]] = []
    for count, interval in enumerate(found):
        alike = [score_mean(scores) for kept, scores in curve.subsets.items() if len(kept) == count]
        cells = [percent(interval.value), spread(interval), percent(min(alike)), percent(max(alike))]
        rows.append([str(count), *cells])
    columns = ("encoders kept", "mean score %", "95 % interval", "worst subset", "best subset")
    return Table(_label(curve), columns, rows)


def _differences(mine: Curve, other: Curve, seed: int) -> Table:
    rows: list[list[str]] = []
    for count, (a, b) in enumerate(zip(mine.means, other.means, strict=True)):
        found = paired_difference(a, b, seed=seed)
        rows.append([str(count), percent(found.value), spread(found)])
    columns = ("encoders kept", "difference in points", "95 % interval")
    return Table(f"{_label(mine)} less {_label(other)}, paired by question", columns, rows)


def _by_subset(curve: Curve, subject: Subject) -> Table:
    rows = [
        [_named(kept, subject), percent(score_mean(scores)), spread(mean_interval(scores, seed=subject.seed))]
        for kept, scores in curve.subsets.items()
    ]
    return Table(f"{curve.name}: every subset", ("kept", "score %", "95 % interval"), rows)


def _named(kept: Sequence[int], subject: Subject) -> str:
    return ", ".join(subject.encoders[number] for number in kept) or "none"


def _data(curve: Curve, found: Sequence[Interval]) -> dict[str, object]:
    return {
        "model": curve.name,
        "encoder_dropout": curve.trained,
        "by_count": [written(interval) for interval in found],
        "subsets": [
            {"kept": list(kept), "score": rounded(score_mean(scores))}
            for kept, scores in curve.subsets.items()
        ],
    }
